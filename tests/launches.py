"""Which Triton kernels a call launches."""


def launched_from(monkeypatch, *modules):
    """The names of the kernels that will have been launched by these modules of fastssl.kernels."""
    names = []
    for module in modules:
        launch = module.launch

        def spy(choice, *arguments, launch=launch):
            names.append(choice.kernel.__name__)
            launch(choice, *arguments)

        monkeypatch.setattr(module, "launch", spy)
    return names
