"""What each op means, in plain differentiable PyTorch: any device, any floating dtype. Truth, and last resort."""
