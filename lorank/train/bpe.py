"""A vocabulary learnt from text: byte-level BPE with the words of GPT-2's expression.

    python -m lorank.train.bpe VOCAB_SIZE

is a process that learns from the texts on its standard input, each a line of JSON, and writes the tokenizer in JSON. While the
library learns, Python hears no Ctrl-C; a process can be ended at any time. It imports neither torch nor transformers.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lorank

END, PAD = "<|endoftext|>", "<|pad|>"
SPACE = re.compile(r"(?<=[\S\x1c-\x1f])(?=[^\S\x1c-\x1f])")
"""The beginning of white space as Unicode has it; Python alone also counts four separators."""


def learnt(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def learnt_apart(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """`learnt` in a process, which takes the texts as it counts their words. An exception ends it.

    Raises:
        OSError: it died.
    """
    paths = os.pathsep.join(filter(None, [str(Path(lorank.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {"TOKENIZERS_PARALLELISM": "true", **os.environ, "PYTHONPATH": paths}
    command, pipe = [sys.executable, "-m", __name__, str(vocab_size)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            for text in texts:
                process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.close()
            found = process.stdout.read()
        except BrokenPipeError:
            found = b""
        except BaseException:
            process.kill()
            raise
    if not found:
        raise OSError(
            f"the process that learnt a vocabulary died (exit code {process.wait()}); is there enough memory?"
        )
    return Tokenizer.from_str(found.decode())


def at_spaces(text: str, characters: int = 1 << 12) -> Iterator[str]:
    """A text in parts of at least that many characters, cut before white space, where GPT-2's expression cuts too: the words of
    the parts are those of the text."""
    start = 0
    while found := SPACE.search(text, start + characters):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def main() -> None:
    """Be the process. Ctrl-C is for the one that started it, which then ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = learnt(map(json.loads, sys.stdin.buffer), int(sys.argv[1])).to_str()
    sys.stdout.buffer.write(made.encode())


if __name__ == "__main__":
    main()
