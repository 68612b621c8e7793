"""Every number of the plan that is measured, not derived. Recalibrate with `python
benchmarks/plan.py`, which prints residuals.

Bytes that follow from shapes (weights, adapters, what autograd keeps) are in `memory.py` and have
no constant here.
"""

from __future__ import annotations

MIB, GIB = 2**20, 2**30

# --- memory

# Python with torch, transformers and Lorry imported (resident set, CPU); the CUDA context and its
# kernels (device memory).
LIBRARY_BYTES = {"cpu": 400 * MIB, "cuda": 600 * MIB}

# What the first step loads besides, as steps of a model of two tiny layers show it: torch's
# compiler front end (for AdamW; 32 MiB of it, sympy, no longer with RMS norms and the kernels), the kernels
# oneDNN compiles for bfloat16 and their scratch space;
# cuBLAS's workspace on CUDA.
RUNTIME_BYTES = {"cpu": 100 * MIB, "cuda": 64 * MIB}
COMPILED_BYTES = 20 * MIB  # those of oneDNN

# A run on real data has batches of ever new lengths: kernels of other lengths that are kept, and
# the gaps other buffers leave.
VARIED_LENGTH_BYTES = 80 * MIB

# What the allocator holds beyond what is in use. CUDA: a share of everything that comes and goes
# (blocks are rounded to 2 MiB and split). CPU: gaps in glibc's heap, counted in buffers of [T,
# widest side of a layer]: large blocks are kept there (train/resources/peak.py), and an aligned
# request does not fit into a freed block of its own size (glibc 2.36). Every layer leaves about one
# between its lasting buffers, and the temporaries of a layer's backward leave some more; fewer with
# recompute.
ALLOCATOR_SLACK = {"cpu": 0.02, "cuda": 0.06}
GAPS_PER_LAYER = 1.0
ALLOCATOR_GAPS = {"none": 18.0, "full": 3.0}
# Fewer where what passes between two lasting buffers leaves room for one of them
# (models/decoder/pointwise.py, `empty_scratch_like`): RMS norms. Measured on processors without matrix
# tiles: float32 (AMD EPYC, AVX2), which has no gaps between layers; bfloat16 (Xeon, AVX-512; 6 and 12
# layers of width 512, 2,048 to 6,144 tokens), 4.2 and 0.75 a layer. The numbers above are of bfloat16 on
# AMX from before that, and stay its upper bound until measured there.
FEWER_GAPS = {"none": 5.0, "full": 3.0}
# In all, however many layers, of bfloat16 where attention runs in dot products (AMD EPYC, AVX512-BF16; 12 and 30
# layers, 256 to 2,048 tokens): at most 11.5, with RMS norms and nothing recomputed half of that.
DOTS_GAPS = {"none": 12.0, "full": 12.0}

# What a plan adds to the sum of all that it counts, so that it bounds a run from above: measured
# peaks were up to 5.8% above that sum (a whole run of SmolLM2-135M, r 64, 128 tokens, float32, in
# benchmarks/results/ranks-memory-cpu-*.json; the 20 configurations of plan-cpu-*.json 4.9%, a whole run of
# NPO 1.1%, one of three jobs 3.6%), by gaps that hang on the order of the lengths of real batches and on
# what the heap held before. Nothing of CUDA has been measured.
PLAN_MARGIN = {"cpu": 0.06, "cuda": 0.0}

# Of transformers' own code, run by autograd: the workspace of a layer's backward relative to that
# of the fused path.
PLAIN_WORKSPACE = 2.0

# --- copied from the engine, which tests hold to it: the widest head of the attention kernels; rows and
# logits of a pass over the vocabulary, rows of a chunk when the head is adapted, and how many
# copies of such a chunk of logits are alive.
MAX_HEAD_DIM = 256
SCORE_GROUP, SCORE_TILE = 1024, 1 << 21
SCORE_CHUNK, CHUNK_COPIES = 256, 3

# Tokens from which a pass over the base gains nothing more from having others beside them: up to so
# many, jobs share a pass.
MIN_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}

# NCCL: rings, channels and the user buffers they register, per GPU; an estimate that no machine
# here can check. gloo: its threads and the pieces in which it sends.
COMMUNICATION_BYTES = {"cpu": 10 * MIB, "cuda": 500 * MIB}

# What a rank with a part of the vocabulary tells of a token's scores, fp32: the five sums of a
# softmax, its highest token and the chosen one's logit (models/scoring/tiles.py).
SCORE_STATISTICS = 28

# What oneDNN compiles for the two copies of a small model that tensor ranks train before they load
# theirs (models/tensor_parallel_proof.py), and keeps: about a megabyte for each shape.
TWIN_BYTES = 56 * MIB

# FSDP2: the layer at work and the one that is being fetched, which on a CPU has no place yet.
GATHERED_LAYERS = {"cpu": 1, "cuda": 2}

# --- time

# Share of the measured matrix rate that a whole step reaches, by the path of its layers: a stated
# efficiency, not a promise. On a CPU by what computes attention: matrix tiles are so fast that all else
# weighs more. benchmarks/results/sft-cpu-*.json at 512 and 1,024 tokens: Lorry 38 to 42% on tiles, 77 to
# 80% in dot products, 77 to 87% on vectors; PEFT over transformers' layers 14%, 33 to 35%, 59 to 69%. Real
# rows are shorter. Without kernels nothing was measured.
STEP_EFFICIENCIES = {
    "tiles": {"fused": 0.35, "plain": 0.12},
    "dots": {"fused": 0.65, "plain": 0.3},
    "vectors": {"fused": 0.65, "plain": 0.5},
    "none": {"fused": 0.35, "plain": 0.12},
    "cuda": {"fused": 0.45, "plain": 0.25},
}
