"""Fine-tuning a quantized model with PEFT: LoRA, rank-stabilised LoRA and DoRA on packed weights.

    config = bitfold.peft.prepare(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    model = peft.get_peft_model(model, config)     # train and save it as any PEFT model
    model = bitfold.peft.load(base, "adapter")     # in place of PeftModel.from_pretrained
    model = bitfold.peft.merge(model)              # or merge(model, torch.bfloat16)

PEFT refuses layers that it doesn't know. Its one door for others, `LoraConfig._register_custom_module`, is marked as
experimental, and isn't saved with the config; `prepare` and `load` go through it each time. The adapters' files are
PEFT's own: they load on the 16-bit base without bitfold.
"""

from bitfold import versions

versions.PEFT.require("bitfold.peft")

from bitfold.peft.adapters import load, prepare  # noqa: E402
from bitfold.peft.merging import MergeSummary, merge  # noqa: E402

__all__ = ["MergeSummary", "load", "merge", "prepare"]
