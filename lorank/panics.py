"""What Rust calls a panic: libraries written in it, as tokenizers are, raise one that is no Exception."""

import contextlib
from collections.abc import Iterator


def is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # of which each library has another class


@contextlib.contextmanager
def no_panic(failure: str, advice: str) -> Iterator[None]:
    """ValueError instead of a panic: what failed, in its own words why, and what may be done."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        why = (str(error).strip() or "it gives no reason").splitlines()[0]
        raise ValueError(f"{failure} ({why}); {advice}") from None
