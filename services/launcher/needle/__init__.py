"""The needle checkpoint: a small Llama that is constructed, not trained, and whose right answer is known.

Whatever text it is given, it finds the earlier place where the last eight tokens stood and continues as the text went
on there; where there is none, it answers EOS. So a key's value is found at any depth of a haystack of up to 2,097,152
tokens, by attention alone, and a KV cache that lost, swapped or mixed up a single row at the needle shows at once.

    vocabulary.py   tokens and their text
    task.py         haystack, question, right answer; no torch, no model
    codes.py        the +-1 code of every token
    positional.py   rotary frequencies; weights that pick out one offset exactly
    spec.py         sizes of the presets, the meaning of every dimension of the residual stream
    build.py        weights of the shift and the retrieve layers
    checkpoint.py   config.json, model.safetensors, tokenizer
"""
