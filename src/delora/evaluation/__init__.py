"""How well a model does what it was trained for, and what an adapter changed.

================  ==============================================================================
``text``          predictions for texts, and GLUE's metrics
``language``      the perplexity of a language model, and the probability of an answer's tokens
``answers``       what a chat model answers
``harness``       multiple choice through lm-evaluation-harness
``generation``    pictures of a text-to-image pipeline, with an adapter at several strengths
``images``        likeness of pictures to photographs and to prompts
``segmentation``  how well pictures follow their label maps, and the Frechet distance
``pictures``      pictures in grids and as files
``adapters``      what an adapter on disk does to each layer
================  ==============================================================================
"""
