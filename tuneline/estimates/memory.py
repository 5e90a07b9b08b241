"""Estimate the memory of a training device from the configuration alone.

The estimate is the peak of a training: the start of the backward pass, with a full batch of the longest allowed sequences.
Sources of the formulas:

    states        with Adam 16 bytes per trained parameter, a frozen one only its weight: ZeRO (arXiv:1910.02054), section 3.1
    shards        over the processes: optimizer states (zero1), gradients (zero2), weights (zero3, fsdp): same paper, section 5
    activations   as in "Reducing Activation Recomputation" (arXiv:2205.05198), section 4, adapted to what transformers, PEFT
                  and TRL keep: `tests/program/test_estimates.py` compares with their code
    QLoRA         NF4 and 0.127 bits per weight for its quantized scales: arXiv:2305.14314, section 3

`other` has what no formula covers: the CUDA context and the allocator's overhead. docs/estimates.md lists the errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuneline.estimates.architectures import BYTES, Architecture
from tuneline.kinds.adapters import Lora
from tuneline.kinds.optimization import PAGED
from tuneline.kinds.training import Training

CONTEXT = 1 << 30  # bytes per GPU: CUDA context, library workspaces, memory that the allocator reserves but does not use
PROCESS = 3 << 28  # bytes per process on the CPU: Python, torch and the trainer, without a model
TILE = 4096, 32768  # tokens and vocabulary entries that TRL's fused head processes at once
CPU_TILES = 8  # float32 copies of a tile that it makes without Triton
BUCKET = 500_000_000  # DeepSpeed's default: elements per communication
NF4_BITS = 4.127


@dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes: of a GPU, or of one process without GPUs."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int
    """Context, workspaces, communication buffers."""
    offloaded: int = 0
    """CPU memory per process, by offloading."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other


@dataclass(frozen=True)
class Job:
    """A training from the view of one device."""

    architecture: Architecture
    stage: Training
    length: int
    """Length of the longest sequence, in tokens."""
    method: str = "lora"
    bits: int = 4
    """Bits per base weight with qlora."""

    @property
    def trainable(self) -> int:
        if self.method == "full":
            return self.architecture.parameters
        return self.architecture.adapter_parameters(self.stage.adapter_settings())

    @property
    def on_gpu(self) -> bool:
        return self.stage.resources.gpus > 0

    @property
    def compute(self) -> int:
        """Bytes per element of the compute type."""
        return BYTES[self.stage.compute_type()]

    @property
    def deepspeed(self) -> bool:
        return self.stage.resources.uses_deepspeed

    @property
    def mixed(self) -> bool:
        """Whether autocast computes in bfloat16 with float32 trained weights. DeepSpeed converts them to bfloat16."""
        return self.compute == 2 and not self.deepspeed

    @property
    def states(self) -> tuple[int, int, float]:
        """Bytes of weight, gradient and optimizer state per trained parameter; DeepSpeed's states include its float32 copy."""
        # AdaLoRA: three float32 values of importance (`ipt` and its means, peft/tuners/adalora/layer.py).
        allocator = 12 if self.stage.adapter_settings().kind == "adalora" else 0
        return (self.compute, self.compute, 12) if self.deepspeed else (4, 4, self.of_optimizer + allocator)

    @property
    def of_optimizer(self) -> float:
        """Bytes of optimizer state per trained parameter: two float32 for Adam, two bytes and their scales in 8 bits, one for Lion and for
        Muon's matrices, and for Adafactor a row and a column of each matrix."""
        optim = self.stage.optim
        if optim == "adafactor":
            return 0.0 if self.method == "full" else 4 / self.stage.lora.r
        if optim == "muon" and self.method == "full":
            return 4 + 4 * min(1.0, 2 * self.architecture.head_parameters / self.architecture.parameters)
        return {"adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "lion": 4, "muon": 4}.get(optim, 8)

    @property
    def frozen(self) -> int:
        """Bytes of frozen weights. QLoRA quantizes the linear layers, but not embeddings, head and norms."""
        if self.method == "full":
            return 4 * self.architecture.parameters if self.stage.copies_base() else 0
        quantized = self.architecture.linear_parameters if self.method == "qlora" else 0
        bits = NF4_BITS if self.bits == 4 else self.bits
        return round(quantized * bits / 8) + self.compute * (self.architecture.parameters - quantized)

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.stage.micro_batch_size() * self.stage.sequences_per_row()

    @property
    def shared(self) -> int:
        """Number of processes that share each sequence."""
        return self.stage.resources.sequence_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * -(-self.length // self.shared)

    # --- one device ---------------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        resources, strategy = self.stage.resources, self.stage.resources.strategy
        of_weight, of_gradient, of_state = self.states
        weights = self.frozen + of_weight * self.trainable
        gradients, optimizer = of_gradient * self.trainable, round(of_state * self.trainable)
        activations = max(self.activations(), self.sampling())
        context = CONTEXT if self.on_gpu else PROCESS
        if strategy == "device_map":
            spread = max(1, resources.gpus)
            return Memory(-(-weights // spread), -(-gradients // spread), -(-optimizer // spread), -(-activations // spread), context)

        world, sharded = resources.world_size, resources.shards_weights
        shard = -(-weights // world) if sharded else weights
        gradients_here = -(-gradients // world) if strategy in ("zero2", "zero3", "fsdp") else gradients
        states = -(-optimizer // world) if strategy != "ddp" else optimizer
        away_weights = shard if resources.offload == "all" and sharded else 0
        away_states = states if (resources.offload and strategy != "ddp") or self.stage.optim in PAGED else 0
        weights_here = shard - away_weights
        other = context + self.buffers(gradients) + (min(weights - weights_here, self.gathered) if sharded else 0)
        return Memory(weights_here, gradients_here, states - away_states, activations, other, away_weights + away_states)

    def buffers(self, gradients: int) -> int:
        """Return the communication buffers: DDP's buckets are a second copy of the gradients, DeepSpeed has two of a fixed size."""
        if self.deepspeed:
            return 2 * self.compute * min(BUCKET, self.trainable)
        return gradients if self.stage.resources.strategy == "ddp" and self.stage.resources.world_size > 1 else 0

    @property
    def gathered(self) -> int:
        """Bytes of sharded weights that are gathered at the same time: the head, and two layers, one of them prefetched."""
        return self.compute * (self.architecture.head_parameters + 2 * self.architecture.layer_parameters)

    # --- activations --------------------------------------------------------------------------------------------------

    def activations(self) -> int:
        """Return the bytes that the forward pass of a micro-batch keeps for the backward pass, plus the peak of temporaries."""
        a, tokens = self.architecture, self.tokens
        layer = tokens * self.layer()
        if self.stage.resources.gradient_checkpointing:  # keeps the input of each layer; recomputes one layer at a time
            entering = 4 if self.method == "full" and self.mixed else self.compute
            kept = tokens * entering * a.hidden_size * a.num_hidden_layers + layer
        else:
            kept = layer * a.num_hidden_layers
        copies = self.compute * self.trainable if self.mixed else 0  # autocast's copies of float32 weights
        last = tokens * (4 + self.compute) * a.hidden_size  # the last norm, and the head's input
        backward = tokens * (3 * self.compute * a.intermediate_size + 8 * a.hidden_size)  # gradients inside a layer
        decoded = self.compute * a.hidden_size * a.intermediate_size if self.method == "qlora" else 0  # one weight at a time
        return kept + copies + last + max(backward + decoded, self.head())

    def layer(self) -> int:
        """Return the bytes that a decoder layer keeps per token. Norms compute in float32. A frozen linear layer keeps nothing, an
        adapter its inputs."""
        a, compute, full = self.architecture, self.compute, self.method == "full"
        norms = 4 * a.family.norms * (a.hidden_size + 1)
        if full:  # the weights of norms are trained too
            norms += (4 if self.mixed else compute) * a.family.norms * a.hidden_size
        if a.family.head_norms:
            norms += (4 + (compute if full else 0)) * (a.queries + a.keys) + 4 * (a.num_attention_heads + a.num_key_value_heads)
        # With a mask, for padding or between packed rows, keys and values are repeated for each query head.
        masked = self.shared == 1 and (self.rows > 1 or self.stage.packs())
        keys = a.queries if masked else a.keys
        attention = 2 * compute * (a.queries + keys) + 4 * a.num_attention_heads + (compute * self.length if masked else 0)
        mlp = 3 * compute * a.intermediate_size
        return norms + attention + mlp + (self._into_weights() if full else self._into_adapters())

    def _into_weights(self) -> int:
        """Return the bytes of the inputs of trained linear layers; autocast casts them for each. Attention keeps `o_proj`'s anyway."""
        a = self.architecture
        return self.compute * ((5 if self.mixed else 2) * a.hidden_size + a.intermediate_size)

    def _into_adapters(self) -> int:
        """Return the bytes of the inputs of A and B of each adapter. Parallel layers share them, unless cast or dropped out for each."""
        a, settings, compute = self.architecture, self.stage.adapter_settings(), self.compute
        own, shared = 0.0, dict[str, float]()
        for name, layers in a.targeted(settings).items():
            inputs, outputs = a.linear[name]
            share = len(layers) / a.num_hidden_layers
            own += compute * sum(map(settings.inner_size, layers)) / a.num_hidden_layers
            if self.mixed or settings.dropout():
                own += share * compute * inputs
            elif name != "self_attn.o_proj":  # attention keeps its input anyway
                source = "mlp.down_proj" if name == "mlp.down_proj" else name.partition(".")[0]
                shared[source] = max(shared.get(source, 0), share * compute * inputs)
            if settings.dropout():
                own += share * inputs * (1 if self.on_gpu else 4)  # dropout mask
            if isinstance(settings, Lora) and settings.use_dora:
                own += share * 2 * compute * outputs
        return round(own + sum(shared.values()))

    def head(self) -> int:
        """Return the bytes of TRL's fused head: a tile of logits, float32 gradients of the hidden states, and of the head if trained."""
        a = self.architecture
        scored = self.rows * -(-self.stage.scored_tokens(self.length) // self.shared)
        tile = min(scored, TILE[0]) * TILE[1] * (self.compute if self.on_gpu else 4 * CPU_TILES)
        if self.stage.full_logits():  # logits, their log-probabilities and the gradients of both
            tile = 4 * self.rows * self.length * 4 * a.vocab_size
        return tile + 4 * scored * a.hidden_size + (4 * a.head_parameters if self.method == "full" else 0)

    def sampling(self) -> int:
        """Return the bytes of sampling by the trained model: KV cache of a step's sequences, prefill of the prompts, next logits."""
        if not (sampled := self.stage.sampled_tokens()):
            return 0
        a, compute = self.architecture, self.compute
        cache = 2 * compute * a.keys * a.num_hidden_layers * self.length
        prompt = 3 * compute * a.intermediate_size * (self.length - sampled)
        sequences = -(-self.stage.global_batch_size // self.stage.resources.world_size)
        return sequences * (cache + prompt + (compute + 8) * a.vocab_size)
