"""Imports models that nobody here wrote, from torchvision and timm, also beside a torch they were not built for."""

import functools

import torch.library


@functools.cache
def torchvision_models():
    """torchvision's wheel is linked to a CUDA torch; with another it lacks operators that its models never call."""
    register_fake = torch.library.register_fake

    def skip_missing(name, *args, **kwargs):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register_fake(name, *args, **kwargs)

    torch.library.register_fake = skip_missing
    try:
        import torchvision.models
    finally:
        torch.library.register_fake = register_fake
    return torchvision.models


@functools.cache
def timm():
    torchvision_models()
    import timm

    return timm
