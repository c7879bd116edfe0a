"""One file for each experiment, each reads top to bottom: model, inject, data, train, evaluate."""
