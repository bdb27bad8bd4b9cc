"""How the toy's places follow from the picture size: they are among its weights."""


def config_of_size(sample_size: int) -> dict:
    return {"side": sample_size}
