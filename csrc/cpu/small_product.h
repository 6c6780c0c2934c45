// Products of small matrices in anybody's memory, a batch of them. Included once per instruction set.

namespace fastssl::cpu::FASTSSL_ISA {

// Items [begin, end): item = matrix · panels + panel of kTileColumns columns.
template <class T>
void small_product(const SmallProduct& op, int64_t begin, int64_t end) {
  constexpr int R = kTileRows, C = kTileColumns<T>;
  const int64_t panels = ceil_div(op.columns, C);
  Scratch scratch(Scratch::bytes_of<T>(strips_size<T>(op.rows, op.inner)) +
                  Scratch::bytes_of<T>(op.inner * C) + Scratch::bytes_of<T>(R * C));
  T* strips = scratch.take<T>(strips_size<T>(op.rows, op.inner));
  T* panel = scratch.take<T>(op.inner * C);
  T* result = scratch.take<T>(R * C);
  const bool in_rows = op.b.dtype == (sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat) &&
                       op.b.column_stride == 1 && op.b.row_stride >= C;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t matrix = item / panels, j = item % panels * C;
    const int64_t columns = std::min<int64_t>(C, op.columns - j);
    if (matrix != packed) {
      pack<T, R>(strips, element(op.a, matrix, 0), op.a.dtype, op.a.row_stride, op.a.column_stride, op.rows,
                 op.inner);
      packed = matrix;
    }
    const char* b = static_cast<const char*>(element(op.b, matrix, 0)) +
                    j * op.b.column_stride * element_size(op.b.dtype);
    // Whole panels of rows of T are read where they lie.
    const bool here = in_rows && columns == C;
    if (!here) pack<T, C>(panel, b, op.b.dtype, op.b.column_stride, op.b.row_stride, columns, op.inner);
    Strided out = op.out;
    out.data = static_cast<char*>(out.data) + j * out.column_stride * element_size(out.dtype);
    const T* from = here ? reinterpret_cast<const T*>(b) : panel;
    for (int64_t i = 0; i < op.rows; i += R) {
      tile<T, 2>(op.inner, strip_at<T>(strips, i, op.inner), from, here ? op.b.row_stride : C, result, C);
      store_strip<T>(result, C, std::min<int64_t>(R, op.rows - i), columns, out, matrix, 0, i);
    }
  }
}

template <class T>
constexpr SmallProductKernels small_product_kernels() {
  return {small_product<T>, kTileColumns<T>};
}

}  // namespace fastssl::cpu::FASTSSL_ISA
