"""Options of timm's train.py that `dtokd train` has not, and what to do instead."""

from __future__ import annotations

_ONE_CYCLE = "the schedules here have one cycle without noise; see --sched"
_SPLITS = "augmentation splits are not built; --aug-repeats repeats each image in other augmentations"
_DIVIDED = "batch normalization is one for all images; --sync-bn joins it over processes"
_AMP = "--amp with --amp-dtype is torch's own mixed precision"
_NAFLEX = "images have one size in a run: --img-size or --input-size"
_SAMPLES = "an epoch sees the whole split"

#: By option, what stands in its place; docs/cli-train.md shows the table.
ABSENT = {
    "--amp-impl": _AMP,
    "--aot-autograd": "--torchcompile aot_eager",
    "--apex-amp": _AMP,
    "--aug-splits": _SPLITS,
    "--bce-pos-weight": "--bce-loss weighs all classes alike",
    "--bce-sum": "--bce-loss is the mean over the classes",
    "--bn-eps": "--model-kwargs, where the model takes it",
    "--bn-momentum": "--model-kwargs, where the model takes it",
    "--dataset-trust-remote-code": "no code of a data set runs here",
    "--device-modules": "import them in a program that calls dtokd.train.run.train",
    "--drop-block": "--drop and --drop-path",
    "--drop-connect": "--drop-path",
    "--epoch-repeats": "pass more --epochs",
    "--fast-norm": "--model-kwargs, where the model takes it",
    "--fuser": "--torchcompile",
    "--gp": "--model-kwargs global_pool=NAME",
    "--head-init-bias": "the head starts as the model makes it",
    "--head-init-scale": "the head starts as the model makes it",
    "--input-img-mode": "--in-chans 1 reads grey images, else RGB",
    "--input-key": "data sets with other keys need a folder of images",
    "--jsd-loss": _SPLITS,
    "--local-rank": "torchrun sets it",
    "--local_rank": "torchrun sets it",
    "--loss": "cross entropy, or --bce-loss",
    "--lr-cycle-decay": _ONE_CYCLE,
    "--lr-cycle-limit": _ONE_CYCLE,
    "--lr-cycle-mul": _ONE_CYCLE,
    "--lr-k-decay": _ONE_CYCLE,
    "--lr-noise": _ONE_CYCLE,
    "--lr-noise-pct": _ONE_CYCLE,
    "--lr-noise-std": _ONE_CYCLE,
    "--model-dtype": _AMP,
    "--model-ema-force-cpu": "the average is on the student's device",
    "--naflex-loader": _NAFLEX,
    "--native-amp": _AMP,
    "--no-prefetcher": "timm's prefetching loader is always used",
    "--no-resume-opt": "--initial-checkpoint starts with weights alone",
    "--patience-epochs": "--sched plateau has timm's default of 10",
    "--recovery-interval": "Ctrl-C and SIGTERM save in the middle of an epoch",
    "--resplit": _SPLITS,
    "--save-epochs": "--checkpoint-hist",
    "--save-images": "dtokd predict draws pictures",
    "--split-bn": _DIVIDED,
    "--start-epoch": "--resume goes on at the epoch of its checkpoint",
    "--stop-epoch": "--epochs; a finished run goes on with more of them and --resume auto",
    "--synchronize-step": "times are measured where a line is written, which waits for the device",
    "--target-key": "data sets with other keys need a folder of images",
    "--task": "one label per image; dtokd detect finds boxes",
    "--torchscript": "--torchcompile",
    "--train-num-samples": _SAMPLES,
    "--tta": "an image is judged once",
    "--use-multi-epochs-loader": "worker processes start anew in each epoch, so that a run can be resumed bit for bit",
    "--val-interval": "the validation split is judged after each epoch",
    "--val-num-samples": _SAMPLES,
    "--wandb-project": "the project is named as the folder of --output; WANDB_PROJECT overrides it",
    "--wandb-resume-id": "the run of Weights & Biases goes on with --resume",
    "--wandb-tags": "WANDB_TAGS",
    "--worker-seeding": "workers are seeded as timm's are by default",
}
