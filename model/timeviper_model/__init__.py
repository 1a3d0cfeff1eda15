"""TimeViper in plain PyTorch: a hybrid Mamba-2 / Transformer language model that reads long videos."""

from wrapt import register_post_import_hook

# transformers is slow to import, so its auto classes get ours when something else imports them
for _module, _register in (
    ("configuration_auto", "register_config"),
    ("modeling_auto", "register_model"),
    ("processing_auto", "register_processor"),
):
    register_post_import_hook(
        f"timeviper_model.weights.auto_classes:{_register}", f"transformers.models.auto.{_module}"
    )
