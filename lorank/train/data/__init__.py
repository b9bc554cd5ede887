"""Text in, token sequences out: where documents come from, how they are split, tokenised and cut.

    source  ->  documents  ->  training | validation  ->  tokenizer  ->  sequences [rows, sequence_length]

A source is `embedded` (the running interpreter's own standard library), local files, or a data set of the hub, which is
streamed. `files` finds and caches files, `reading` reads one; `datasets` keeps sequences and streams; `tokenizers` does BPE.
No document is on both sides of the split. Packing loses only the tokens that do not fill the last sequence.
"""

from lorank.train.data.corpus import Corpus, load_corpus, load_evaluation, share_trained_on
from lorank.train.data.documents import same_content
from lorank.train.data.form import end_of
from lorank.train.data.sequences import TextSize, check_ids, collate
from lorank.train.data.sources import cache_folder, files_of
from lorank.train.data.specials import padding_id, rows_of
from lorank.train.data.tokenizers import byte_tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "TextSize",
    "byte_tokenizer",
    "cache_folder",
    "check_ids",
    "collate",
    "end_of",
    "files_of",
    "load_corpus",
    "load_evaluation",
    "load_tokenizer",
    "padding_id",
    "rows_of",
    "same_content",
    "share_trained_on",
]
