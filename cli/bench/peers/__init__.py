"""`elasticmoe bench serve --peers`: other engines on the same checkpoint, in turns with ours, under the same client.

engine       what an engine is: its packages, its form of the checkpoint, its server's command
engines      those that there are, by name
vllm, llama_cpp, openvino
             one engine each; the scripts beside them run in the engines' own environments
environment  a virtual environment of an engine
installation engines in the user's cache, each made once
server       a running server: start, first token, memory, end
interference what others took of the machine meanwhile
compare      rounds over all of them, and the tables
"""
