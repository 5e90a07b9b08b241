"""LLaMA-Factory's keys: what becomes of each, and the defaults that it and transformers have."""

from __future__ import annotations

from tuneline.config.training_aliases import TEMPLATE
from tuneline.imports.fates import REMOVE, Joined, Refused, Table, Without, each, same_if, to
from tuneline.imports.huggingface import (
    FITS,
    KEPT,
    LORA,
    MEGATRON,
    MULTIMODAL,
    NO_FIELD,
    NO_VISION,
    OTHER_CHIPS,
    OTHER_OPTIMIZER,
    SPEED,
    TRAINING,
    UPLOADS,
)
from tuneline.imports.values import above, attention, if_on, kernels, modules, names, number, size, true, whole

KINDS = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto"}

LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
REASONING = to("base.chat_template_kwargs.enable_thinking", by=true)
TOKENS = Refused("write `add_tokens: [...]`: the embeddings of new tokens are trained")
GENERATED = Without("a stage of kind `evaluate` generates answers: `eval_dataset` makes one")
TABLE: Table = {
    **TRAINING,
    **LORA,
    **each("model_name_or_path stage finetuning_type", Joined("train.model")),
    **each("quantization_bit quantization_method", Joined("train.method")),
    **each("dataset dataset_dir max_samples", Joined("data.sources")),
    "val_size": Joined("data.split.validation"),
    **each("adapter_name_or_path create_new_adapter", Joined("train.adapter")),
    **each("packing neat_packing", Joined("train.packing")),
    **each("train_on_prompt mask_history", Joined("train.train_on")),
    **each("model_revision", to("base.revision", by=str)),
    "trust_remote_code": to("base.trust_remote_code", by=true),
    "cutoff_len": to("train.max_length", "data.max_length", by=whole),
    "default_system": to("data.system", by=str),
    "template": Without(TEMPLATE.removeprefix(REMOVE)),
    "additional_target": to("train.lora.modules_to_save", by=names),
    "loraplus_lr_ratio": to("train.lora.lora_plus_ratio", by=number),
    "pissa_init": to("train.lora.init_lora_weights", by=if_on("pissa")),
    "pissa_iter": Joined("train.lora.init_lora_weights"),
    "pissa_convert": Without("an adapter is saved so that it fits the unchanged base model"),
    "flash_attn": to("train.resources.attn_implementation", by=attention),
    "enable_liger_kernel": to("train.resources.kernels", by=kernels),
    "disable_gradient_checkpointing": to("train.resources.gradient_checkpointing", by=lambda value: not true(value)),
    "double_quantization": Without("4 bits always use double quantization") ,
    "quantization_type": same_if(("nf4",), "4 bits are always NF4", Refused("4 bits are always NF4")),
    "early_stopping_steps": to("train.early_stopping.patience", by=whole),
    "pref_beta": to("train.beta", by=number),
    "pref_loss": to("train.loss_type", by=lambda value: LOSSES.get(value, NO_FIELD)),
    "pref_ftx": to("train.rpo_alpha", by=lambda value: number(value) or Without("0 adds no term, as here")),
    "dpo_label_smoothing": to("train.label_smoothing", by=number),
    "kto_chosen_weight": to("train.desirable_weight", by=number),
    "kto_rejected_weight": to("train.undesirable_weight", by=number),
    "use_muon": to("train.optim", by=if_on("muon")),
    "export_dir": KEPT,
    "export_size": to("merge.max_shard_size", by=size),
    "export_device": Without("a merge works shard by shard on the CPU"),
    "export_legacy_format": Without("weights are saved as safetensors, the only format that transformers 5 writes"),
    "export_quantization_bit": to("quantize.bits", by=whole),
    "export_quantization_dataset": Joined("quantize.calibration"),
    "export_quantization_nsamples": to("quantize.samples", by=whole),
    "export_quantization_maxlen": to("quantize.max_length", by=whole),
    "export_hub_model_id": UPLOADS,
    "infer_dtype": to("merge.dtype", by=str),
    "infer_backend": Without("a stage of kind `evaluate` has `backend: vllm`"),
    **each("preprocessing_num_workers preprocessing_batch_size tokenized_path data_shared_file_system buffer_size low_cpu_mem_usage"
           " use_fast_tokenizer use_unsloth_gc print_param_status offload_folder use_kv_cache ray_num_workers ray_init_kwargs"
           " ray_storage_path ray_run_name resources_per_worker placement_strategy use_v1_kernels", Without(SPEED)),
    "use_unsloth": Without("TRL already computes the loss without all logits"),
    "ignore_pad_token_for_loss": Without("padding is never trained on"),
    **each("streaming overwrite_cache", Without("the dataset is an artifact in the store")),
    "upcast_layernorm": Without("norms compute in float32 in autocast"),
    "disable_shuffling": Refused("rows are always shuffled, by the stage's `seed`"),
    "mix_strategy": same_if(("concat",), "sources are concatenated", Without("sources with `weight` are mixed, the others concatenated")),
    "interleave_probs": Joined("data.sources.weight"),
    "eval_dataset": Joined("evaluate.datasets"),
    "max_new_tokens": to("evaluate.max_new_tokens", by=whole),
    "eval_on_each_dataset": Without("each dataset of an evaluation has its own metrics"),
    **each("do_predict predict_with_generate compute_accuracy eval_num_beams top_p temperature", GENERATED),
    "enable_thinking": REASONING,
    "preserve_thinking": Refused("a row's reasoning is rendered as the model's own template does"),
    "tool_format": Without("tools are rendered by the model's own chat template"),
    "group_by_length": Without(FITS),
    **each("new_special_tokens_config init_special_tokens split_special_tokens", TOKENS),
    "rope_scaling": Refused("set it in the model's config.json"),
    **each("image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen image_do_pan_and_scan media_dir"
           " crop_to_patches use_audio_in_video audio_sampling_rate"
           " freeze_language_model", MULTIMODAL),
    **each("freeze_vision_tower freeze_multi_modal_projector", NO_VISION),
    **each("use_galore use_apollo use_badam use_adam_mini galore_layerwise galore_target galore_rank galore_scale galore_proj_type"
           " galore_update_interval apollo_layerwise apollo_target apollo_rank apollo_scale apollo_scale_type apollo_proj"
           " apollo_update_interval badam_mode badam_switch_mode badam_switch_interval badam_verbose badam_start_block"
           " badam_update_ratio", OTHER_OPTIMIZER),
    **each("use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha", Refused("the loss is cross-entropy over the answers' tokens")),
    **each("freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro mixture_of_depths shift_attn", Refused(
        "what trains is an adapter or all weights: `lora: {layers_to_transform: [...]}` chooses layers"
    )),
    "oft_block_size": to("train.oft.oft_block_size", by=whole),
    "oft_target": to("train.oft.target_modules", by=modules),
    "module_dropout": to("train.oft.module_dropout", by=number),
    "oft_rank": Refused("write `oft: {oft_block_size: 32}`"),
    **each("add_tokens add_special_tokens", to("train.add_tokens", by=names)),
    "resize_vocab": Without("`add_tokens` extends the vocabulary"),
    **each("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather", Refused("tuneline computes in bfloat16 or float32")),
    **each("use_mca use_megatron_bridge megatron_bridge_args", MEGATRON),
    **each("use_kt kt_weight_path kt_use_lora_experts kt_cpu_activation use_hyper_parallel", OTHER_CHIPS),
    "fsdp_transformer_layer_cls_to_wrap": Without("FSDP wraps the layers that the model names"),
    "moe_aux_loss_coef": NO_FIELD,
    "max_steps": to("train.max_steps", by=above(0)),
}  # fmt: skip
DEFAULTS = {  # of LLaMA-Factory, and of transformers' TrainingArguments, which it takes
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "cutoff_len": 2048, "lora_rank": 8,
    "lora_dropout": 0.0, "lora_target": "all", "disable_gradient_checkpointing": False, "weight_decay": 0.0, "max_grad_norm": 1.0,
}  # fmt: skip
EXPORT_DEFAULTS = {"export_quantization_nsamples": 128, "export_quantization_maxlen": 1024}
