"""Every bound of the system in one place. A limit has a unit in its name or in the comment beside it."""

PROTOCOL_VERSION = 9

# Messages
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
FDS_MAX = 253  # descriptors of one message: SCM_MAX_FD of Linux
NAME_CHARS_MAX = 128
EPOCH_MAX = (1 << 53) - 1  # fencing epochs count lives of scalers; JSON tells numbers up to here exactly
REQUEST_ID_CHARS_MAX = 128
ERROR_TEXT_CHARS_MAX = 2_000

# Geometry
RANKS_MAX = 64  # slots of one bus
LAYERS_MAX = 256
EXPERTS_MAX = 1_024
TOP_K_EXPERTS_MAX = 32
HIDDEN_MAX = 65_536
VOCAB_MAX = 1_048_576
DEVICES_MAX = 1_024
TP_MAX = 8  # devices of one replica
BLOCKS_PER_COPY_MAX = 65_536  # KV blocks of one CopyBlocks
MOVE_TARGETS_MAX = 64
TAIL_BYTES_MAX = 32 * 1024 * 1024  # KV that travels in a HandOver itself: the blocks that were not copied before

# Sequences
PROMPT_TOKENS_MAX = 1_048_576
STOP_TOKEN_IDS_MAX = 64
STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 256
LOGIT_BIAS_MAX = 1_024
LOGPROBS_MAX = 20
PROMPT_LOGPROBS_BYTES_MAX = 24 * 1024 * 1024  # of one request: they travel in one message, with others beside them
LOGPROB_MIN = -9999.0  # what is less probable is told as this, as OpenAI's API does
REQUEST_SECONDS_MAX = 24 * 3_600.0
STEP_FAILURES_MAX = 255  # counted of one request, in a row; more are as many

# Sampling: each range is closed and finite, and any combination of values within gives a token or one typed error
TEMPERATURE_MAX = 10.0  # from 0, greedy
REPETITION_PENALTY_MIN = 0.01
REPETITION_PENALTY_MAX = 10.0
OUTPUT_PENALTY_MAX = 2.0  # of presence and frequency, either sign
TOKEN_BIAS_MAX = 100.0  # either sign

# Grammars of the output
GRAMMAR_BYTES_MAX = 131_072  # of its text
GRAMMAR_PACKED_BYTES_MAX = 12_288  # of the text compressed, as messages and ledger rows hold it
GRAMMAR_SYMBOLS_MAX = 100_000  # that its rules are made of
GRAMMAR_ITEMS_MAX = 50_000  # ways to read one token that are looked at: 0.25 s in the worst grammar
GRAMMAR_STATES_MAX = 25_000  # of its texts' automaton, 1 to 2 KB each
VOCABULARY_BYTES_MAX = 48 * 1024 * 1024  # of all tokens' bytes
VOCABULARY_PIECE_BYTES = 256 * 1024  # that travel in one message

# Traces, by W3C
TRACEPARENT_CHARS_MAX = 128  # of version 00 it has 55; later ones may have more
TRACESTATE_CHARS_MAX = 512

# Checkpoints
SAFETENSORS_HEADER_BYTES_MAX = 8 * 1024 * 1024
SAFETENSORS_TENSORS_MAX = 100_000
CONFIG_JSON_BYTES_MAX = 1024 * 1024
CHECKPOINT_INDEX_BYTES_MAX = 32 * 1024 * 1024
CHECKPOINT_FILES_MAX = 512

# Sockets: a Unix socket's path must fit sockaddr_un.sun_path, its final NUL included
SOCKET_PATH_BYTES_MAX = 107
DECODE_ONLY_STEPS_MAX = 16  # steps in a row that only decode

# Signals to the scaler
SKETCH_BUCKETS = 140  # of common/sketch.py: 1 ms to 1000 s with a relative error of 5 %
WINDOW_SECONDS_MAX = 60.0  # that one window spans
WINDOW_COUNT_MAX = 1_000_000_000  # requests, steps or gaps between tokens of one window
WINDOW_TOKENS_MAX = 1 << 48  # of one window
MONOTONIC_SECONDS_MAX = 1e10  # of a monotonic clock: three centuries
STEP_SAMPLES_MAX = 8  # steps that a window tells in full
