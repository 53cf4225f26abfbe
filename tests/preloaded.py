"""Everything that the commands of sidestep import, for processes that are forked from one that has it."""

# ruff: noqa: F401

from sidestep.cli import quick_imports

with quick_imports():
    import diffusers.models.autoencoders.autoencoder_oobleck
    import diffusers.models.transformers.ace_step_transformer
    import lycoris
    import torch.utils.tensorboard
    import transformers.models.qwen3.modeling_qwen3

    import sidestep.data.encode
    import sidestep.exporting.export
    import sidestep.inference.generation
    import sidestep.inspecting.inspect
    import sidestep.training.loop
