ORIGINALS = {}


def write_original(*a): ...
