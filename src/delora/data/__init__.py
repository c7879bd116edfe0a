"""Models and data, fetched when they are used; the repository itself holds no data.

===============  ===============================================================================
``examples``     what all readers share: examples of texts, their tasks, their three parts
``packages``     models and data inside packages of pip or apt, unpacked once into a cache
``sentences``    sentences whose sentiment was rated by people
``glue``         GLUE's eight tasks, with the split of the published runs
``alpaca``       instructions in the form of Alpaca
``chats``        chats, completions and texts as tokens with labels, by the tokenizer's own chat template
``packing``      rows of tokens in batches, padded or several in one row
``dreambooth``   photographs of subjects, with the prompts by which they are judged
``maps``         pictures with their label maps and captions
``tables``       a user's own data: its kind, its three parts, what is odd
``recognising``  what a user's rows are for, and which column holds what
``rows``         the rows of a user's own files, with the place of each
``turns``        conversations of a user's own
``dividing``     rows divided into training, validation and test
===============  ===============================================================================
"""
