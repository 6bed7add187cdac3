"Checkpoints of other layouts: `convert` is imported when it is first used."


def __getattr__(name):
    if name == "convert":
        from delta_llava.checkpoints.converting import convert
        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
