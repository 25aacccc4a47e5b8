"""Training that knows of the rounding to come (quantization-aware training).

    bitfold.qat.prepare(model, "int4-channel")    # layers compute with rounded weights, and train the unrounded ones
    ...                                           # any training loop, Trainer's bf16=True included
    bitfold.qat.convert(model)                    # packed: the codes that the last forward pass used

Rounding is bitfold's own encoder, for every format: integers, nf4, fp4, fp8, GGUF's blocks with their search for
scales. Its gradient is taken to be that of doing nothing (the straight-through estimator, Bengio et al. 2013); scales
follow the weights, or are trained themselves (learned step size, Esser et al. 2020).
"""

from bitfold.qat.convert import convert, prepare
from bitfold.qat.modules import FakeQuantEmbedding, FakeQuantLinear

__all__ = ["FakeQuantEmbedding", "FakeQuantLinear", "convert", "prepare"]
