"""Flags of timm's and torchvision's training scripts, with the keys and flags that mean the same here.

They are not accepted: their values may mean something else, as a learning rate that is not for 512 images does. They
are only recognised, so that the refusal says what to write.
"""

# By the flag, with "-" for "_": a key; or a flag of main.py; or a key with the value to give where there is none.
FOREIGN_FLAGS = {
    # learning rate and length
    "--lr": "TRAIN.BASE_LR",
    "--lr-base": "TRAIN.BASE_LR",
    "--learning-rate": "TRAIN.BASE_LR",
    "--blr": "TRAIN.BASE_LR",
    "--warmup-lr": "TRAIN.WARMUP_LR",
    "--min-lr": "TRAIN.MIN_LR",
    "--lr-min": "TRAIN.MIN_LR",
    "--epochs": "TRAIN.EPOCHS",
    "--warmup-epochs": "TRAIN.WARMUP_EPOCHS",
    "--lr-warmup-epochs": "TRAIN.WARMUP_EPOCHS",
    "--sched": "TRAIN.LR_SCHEDULER.NAME",
    "--lr-scheduler": "TRAIN.LR_SCHEDULER.NAME",
    "--decay-epochs": "TRAIN.LR_SCHEDULER.DECAY_EPOCHS",
    "--lr-step-size": "TRAIN.LR_SCHEDULER.DECAY_EPOCHS",
    "--decay-rate": "TRAIN.LR_SCHEDULER.DECAY_RATE",
    "--lr-gamma": "TRAIN.LR_SCHEDULER.DECAY_RATE",
    "--decay-milestones": "TRAIN.LR_SCHEDULER.MULTISTEPS",
    "--layer-decay": "TRAIN.LAYER_DECAY",
    # optimizer and step
    "--opt": "--optim",
    "--optimizer": "--optim",
    "--opt-eps": "TRAIN.OPTIMIZER.EPS",
    "--opt-betas": "TRAIN.OPTIMIZER.BETAS",
    "--momentum": "TRAIN.OPTIMIZER.MOMENTUM",
    "--weight-decay": "TRAIN.WEIGHT_DECAY",
    "--wd": "TRAIN.WEIGHT_DECAY",
    "--clip-grad": "TRAIN.CLIP_GRAD",
    "--clip-grad-norm": "TRAIN.CLIP_GRAD",
    "--grad-accum-steps": "--accumulation-steps",
    "--grad-checkpointing": "--use-checkpoint",
    "--model-ema": "TRAIN.EMA_DECAY 0.9999",
    "--model-ema-decay": "TRAIN.EMA_DECAY",
    "--ema-decay": "TRAIN.EMA_DECAY",
    "--amp": "AMP_ENABLE True",
    "--amp-dtype": "AMP_DTYPE",
    "--torchcompile": "TRAIN.COMPILE True",
    "--compile": "TRAIN.COMPILE True",
    # data and augmentation
    "--data": "--data-path",
    "--data-dir": "--data-path",
    "--dataset": "DATA.DATASET",
    "-b": "--batch-size",
    "--img-size": "DATA.IMG_SIZE",
    "--input-size": "DATA.IMG_SIZE",
    "--train-crop-size": "DATA.IMG_SIZE",
    "--val-crop-size": "DATA.IMG_SIZE",
    "--interpolation": "DATA.INTERPOLATION",
    "--train-interpolation": "DATA.INTERPOLATION",
    "--workers": "DATA.NUM_WORKERS",
    "--num-workers": "DATA.NUM_WORKERS",
    "-j": "DATA.NUM_WORKERS",
    "--pin-mem": "DATA.PIN_MEMORY True",
    "--pin-memory": "DATA.PIN_MEMORY True",
    "--hflip": "AUG.HFLIP",
    "--color-jitter": "AUG.COLOR_JITTER",
    "--aa": "AUG.AUTO_AUGMENT",
    "--auto-augment": "AUG.AUTO_AUGMENT",
    "--reprob": "AUG.REPROB",
    "--random-erase": "AUG.REPROB",
    "--remode": "AUG.REMODE",
    "--recount": "AUG.RECOUNT",
    "--mixup": "AUG.MIXUP",
    "--mixup-alpha": "AUG.MIXUP",
    "--cutmix": "AUG.CUTMIX",
    "--cutmix-alpha": "AUG.CUTMIX",
    "--cutmix-minmax": "AUG.CUTMIX_MINMAX",
    "--mixup-prob": "AUG.MIXUP_PROB",
    "--mixup-switch-prob": "AUG.MIXUP_SWITCH_PROB",
    "--mixup-mode": "AUG.MIXUP_MODE",
    # model
    "--model": "MODEL.NAME",
    "--arch": "MODEL.NAME",
    "--num-classes": "MODEL.NUM_CLASSES",
    "--drop": "MODEL.DROP_RATE",
    "--drop-path": "MODEL.DROP_PATH_RATE",
    "--smoothing": "MODEL.LABEL_SMOOTHING",
    "--label-smoothing": "MODEL.LABEL_SMOOTHING",
    "--initial-checkpoint": "--pretrained",
    "--finetune": "--pretrained",
    "--weights": "--pretrained",
    # the run
    "--output-dir": "--output",
    "--experiment": "--tag",
    "--seed": "SEED",
    "--log-interval": "PRINT_FREQ",
    "--print-freq": "PRINT_FREQ",
    "--checkpoint-hist": "SAVE_KEEP",
    "--eval-metric": "TRAIN.BEST_METRIC",
    "--evaluate": "--eval",
    "--test-only": "--eval",
    "-c": "--cfg",
    "--config": "--cfg",
}


def explain_flag(flag: str, value: str | None) -> str:
    """Says what to write instead of a flag of timm or torchvision; empty for any other flag.

    Args:
        value: the value that the command line gives to the flag.
    """
    meaning, _, fixed_value = FOREIGN_FLAGS.get(flag.replace("_", "-"), "").partition(" ")
    if not meaning:
        return ""
    value = fixed_value or value
    if meaning == "MODEL.NAME":
        return f"Here --cfg names a recipe. For timm's models: --opts MODEL.TYPE timm MODEL.NAME {value or 'NAME'}."
    if meaning.startswith("-"):
        return f"Here it is {meaning}{f' {value}' if value else ''}."
    per_512 = " (for 512 images a step: it is scaled with the global batch size)" if meaning.endswith("_LR") else ""
    return f"Here it is the key {meaning}{per_512}, set by --opts {meaning} {value or 'VALUE'}."


def key_named(name: str) -> str | None:
    """Returns the key that timm's or torchvision's flag `name`, written without dashes, means here."""
    meaning = FOREIGN_FLAGS.get(f"--{name.lower().replace('_', '-')}", "").partition(" ")[0]
    return meaning if meaning and not meaning.startswith("-") else None
