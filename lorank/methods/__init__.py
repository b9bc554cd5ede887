"""Methods that change what the weights are: one paper, one file."""

from lorank import renamed

renamed.hint(__name__)
