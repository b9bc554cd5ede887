"""From trained dense weights to factors: one structure, one file. The package itself is the function, ``lorank.fit(model, "svd")``."""

import sys
import types
from typing import Any

from lorank.fit.cola import FittedCoLA
from lorank.fit.dictionary import SparseDictionary
from lorank.fit.door import STRUCTURES, Fitted, as_structure, fit
from lorank.fit.eora import EoRA
from lorank.fit.int2 import INT2
from lorank.fit.matrix_pca import MatrixPCA
from lorank.fit.pela import PELA
from lorank.fit.structure import Structure
from lorank.fit.svd import SVD
from lorank.fit.vector_quantised import VectorQuantised

__all__ = [
    "INT2",
    "PELA",
    "STRUCTURES",
    "SVD",
    "EoRA",
    "Fitted",
    "FittedCoLA",
    "MatrixPCA",
    "SparseDictionary",
    "Structure",
    "VectorQuantised",
    "as_structure",
    "fit",
]


class _Callable(types.ModuleType):
    """A package that is called as its function `fit`: importing one of its files must not hide the function."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return fit(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
