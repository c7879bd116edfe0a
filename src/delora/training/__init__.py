"""One engine for every task, on transformers' Trainer: configuration, run folders, adapter-only checkpoints.

===============  =============================================================================
``config``       an experiment as a value, read from TOML or JSON and checked
``models``       text models by name; with an adapter, or merged with one
``parallel``     several processes that run one recipe together
``runs``         a run's folder: its configuration, its result, its lock
``task``         what a task's module must have
``trainer``      transformers' Trainer for adapters
``progress``     the progress bar
``experiments``  all runs of an experiment one after the other, then the delivery of the best
``delivery``     the best run as files, each read back and compared
``causal_lm``    what the tasks on causal language models share
``loggers``      where else a run's metrics go: TensorBoard, trackio, wandb
``denoising``    what text-to-image models of diffusers are trained by
``defaults``     settings that need no search, each with its reason
``memory``       what a training step takes, before anything is loaded
``dial``         the strength of a finished experiment's adapter, chosen on validation data
===============  =============================================================================
"""
