"""The gguf package, or the sentence that says how to get it.

Reading and writing files need no more than its constants; what describes a Hugging Face directory in metadata is its
GGUFWriter (whose keys are taken, nothing is written), Metadata and SpecialVocab.
"""

from __future__ import annotations

from bitfold.versions import MissingExtraError

try:
    from gguf import GGML_QUANT_SIZES as GGML_QUANT_SIZES
    from gguf import GGUF_DEFAULT_ALIGNMENT as GGUF_DEFAULT_ALIGNMENT
    from gguf import GGUF_VERSION as GGUF_VERSION
    from gguf import GGMLQuantizationType as GGMLQuantizationType
    from gguf import GGUFValue as GGUFValue
    from gguf import GGUFValueType as GGUFValueType
    from gguf import GGUFWriter as GGUFWriter
    from gguf import Metadata as Metadata
    from gguf import SpecialVocab as SpecialVocab
    from gguf import TokenType as TokenType
except ImportError:
    raise MissingExtraError("GGUF files need the package gguf: run pip install 'bitfold[gguf]'") from None

if not hasattr(GGMLQuantizationType, "MXFP4"):
    raise MissingExtraError("the package gguf is too old to know MXFP4: run pip install -U 'bitfold[gguf]'")
