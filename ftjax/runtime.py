"""Settings of the process, made before JAX starts."""


def prepare() -> None:
    """Sets what must be set before JAX starts; what the user has set stays."""
