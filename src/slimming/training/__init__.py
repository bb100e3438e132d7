"""Training: one loop, tasks that return a loss, and data readers. This package does not depend on masks or pruning.

config        TrainConfig, DataConfig
sources       records by index: class folders, Parquet, tar shards
hf_datasets   images from the Hugging Face datasets library
images        image preprocessing: decoding, augmentation, per-sample random seeds
samples       data sets of decoded samples, train/validation split, checks of the labels
data          open_data: find the source, the splits and the class names
batches       batches: which images each process sees at each step
step_counts   number of optimizer steps: in total, per epoch, during warm-up
optimisation  parameter groups, optimizer, learning rate schedule, averaged weights, mixup
tasks         classification, losses given as a function, extra penalties
distillation  distillation of logits, features and relations; matching of embeddings
evaluation    top-1 accuracy and loss over all processes
distributed   device and processes, set up by Accelerate
guards        Ctrl-C and out-of-memory errors
resume        saving and loading the state of a run
log           JSON lines, progress bar, trackers
loop          fit: the training loop
lightning     search inside Lightning's Trainer
hf_trainer    search inside the Trainer of transformers
"""
