"""Training: one loop, tasks that return a loss, data readers. Knows nothing about masks or cuts.

config        TrainConfig, DataConfig
readers       where images lie: class folders, Parquet, tar shards, Hugging Face datasets
images        bytes to tensors: decoding, augmentation, the random numbers of one sample
data          open_data: splits, class names, checks
batches       the order of a run: which images each process sees at which step
optimisation  parameter groups, schedule, averaged weights, mixup
tasks         classification, distillation, extra penalties
evaluate      top-1 and loss, exact over all processes
state         what a run writes to go on after it was killed
log           JSON lines, progress bar, trackers
loop          fit
"""
