"""Adapters as files.

================ =====================================================================================
``files``        shared by all formats: atomic writes, and reads that never unpickle and explain errors
``native``       the library's own folders: `delora.save`, `delora.load`
``peft``         Hugging Face PEFT's format: `delora.export.peft`; `delora.load` reads it
``diffusers``    the LoRA files of image programs: `delora.export.diffusers`
``gguf``         llama.cpp's LoRA adapters: `delora.export.gguf`
``gguf_merged``  a model's own GGUF file with the change in its weights
``gguf_names``   what llama.cpp calls models and weights, and their order
``vllm``         what vLLM reads right of PEFT's format: `delora.export.vllm`
``nearest``      the factors of an export: of a bounded rank, in a narrower dtype
``bases``        how a file knows its base's weights: by two numbers
``cards``        the README.md beside an adapter: what it is, and how to use it
``peft_config``  what a configuration of PEFT says: the method and the layers; `delora.from_peft`
``peft_experts`` experts as PEFT's ``target_parameters`` has them
``peft_fields``  what each field of PEFT's configurations means here
``peft_own``     adapters as PEFT's own methods
``peft_names``   what PEFT does with the names in a file
``patterns``     PEFT's patterns of names, matched in bounded time
================ =====================================================================================
"""
