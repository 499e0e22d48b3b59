"""Adapters of a model, loaded while it is served: soft prompts and LoRA.

    store      ids -> open directories of the store: what lies there, and whether it has changed
    prompts    soft prompts: files -> checked tensors
    lora       LoRA (PEFT): files -> checked tensors by target module
    load       one adapter of either kind, whatever it is

Files of a store are never trusted: no code is run, nothing large is read before it is checked, and
nothing outside the store is opened.
"""
