"""What the sweep over every field of Hugging Face PEFT's configurations sets, and what must follow.

Booleans are flipped, and of a field's choices each is taken, by PEFT's own types; what else a user
may set stands in `VALUES`. A field or choice that has neither a value nor a treatment here fails
``tests/hf/test_fields.py``. Keys are ``METHOD.field=value``, ``METHOD.field``, ``field=value`` or
``field``: the first that fits holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Idle:
    """Changes neither the tensors of a file nor what they mean, in PEFT's own hands."""

    why: str


@dataclass(frozen=True)
class Kept:
    """As `Idle`; PEFT cannot run it here, so that a file is edited: it is read alike, and kept."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A file that sets it is an error, which names the field."""

    why: str


@dataclass(frozen=True)
class Never:
    """PEFT itself refuses the value."""

    why: str


@dataclass(frozen=True)
class Elsewhere:
    """Another test compares it: its file and name under tests/hf."""

    test: str


@dataclass(frozen=True)
class Alike:
    """Compared live; and nothing of it shows on the sweep's net."""

    why: str


@dataclass(frozen=True)
class Called:
    """Compared live but for merged weights, which PEFT does not give."""

    why: str


@dataclass(frozen=True)
class Read:
    """What PEFT writes is compared live; a fresh adapter of ours is an error, with the reason."""

    why: str


Treatment = Alike | Called | Idle | Kept | Read | Refused | Never | Elsewhere
TRAINING = Idle("it acts in training alone")
NOTE = Kept("a note in the file")
LORA_INIT = "the base it belongs to was changed by what the file does not hold"

BASE: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 3, "total_step": 9},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "BEFT": {"target_modules": ["fc1"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 1, 4, 1]},
    "DEFT": {"r": 3},
    "DELORA": {"r": 3},
    "FOURIERFT": {"n_frequency": 9},
    "GLORA": {"r": 3},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 3},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 3},
    "LN_TUNING": {"target_modules": ["ln"]},
    "LOHA": {"r": 3},
    "LOKR": {"r": 3},
    "LORA": {"r": 3},
    "MISS": {"r": 2},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {"r": 3},
    "POLY": {"r": 4, "n_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PVERA": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3},
    "RANDLORA": {"r": 2, "randlora_alpha": 8},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1, "random_seed": 1},
    "SUPERTUNING": {"sparsity": 0.8, "r": 2},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 4]},
    "UNILORA": {"theta_d_length": 40, "save_indices": True},
    "VBLORA": {"r": 2, "num_vectors": 6, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 9},
}
"""What a method starts from; its targets are "fc1" and "fc2" unless said."""
PROMPT = {"token_dim": 8, "num_layers": 2, "num_attention_heads": 2, "task_type": "CAUSAL_LM"}
"""The model that a prompt is made for."""
TOKENIZER, SOURCE = "<tokenizer>", "<source>"
"""Paths that the sweep makes."""
TEXT = {
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "classify this",
    "tokenizer_name_or_path": TOKENIZER,
}
OF_SOURCE = {"num_tasks": 1, "prompt_tuning_init_state_dict_path": SOURCE}

VALUES: dict[str, list[Any]] = {
    "auto_mapping": [{"base_model_class": "Net"}],
    "base_model_name_or_path": ["someone/model"],
    "peft_version": ["0.1.0"],
    "revision": ["main"],
    "target_modules": [["fc1"], ["layers.1.fc2", "fc1"], r"body\.layers\.\d\.fc1"],
    "LORA.target_modules": [["fc1"], r".*\.0\.fc\d", "all-linear"],
    "BEFT.target_modules": [r".*\.1\.fc1"],
    "LN_TUNING.target_modules": [["ln", "fc1"], r".*\.1\.ln"],
    "TRAINABLE_TOKENS.target_modules": [["fc2"], "body.layers.0.fc2"],
    "ADAPTION_PROMPT.target_modules": ["self_attn"],
    "exclude_modules": [["layers.0.fc1"], ["fc2"], r".*\.0\.fc1"],
    "LN_TUNING.exclude_modules": [["layers.0.ln"], r".*\.0\.ln"],
    "layers_to_transform": [1, [0]],
    "layers_pattern": ["layers", ["layers", "h"]],
    "modules_to_save": [["score"], ["score", "ln"]],
    "LN_TUNING.modules_to_save": [["score"], "score"],
    "bias": ["all", "only"],
    "FOURIERFT.bias": ["all", "fourier_only"],
    "MISS.bias": ["all", "MiSS_only"],
    "lora_bias": [],
    **{f"{m}.bias": ["all", f"{m.lower()}_only"] for m in ("PVERA", "VERA")},
    "rank_pattern": [{"fc1": 2}, {"layers.1.fc1": 1, r".*fc2": 4}],
    "alpha_pattern": [{"fc1": 7}, {r"layers\.1\.fc1": 2, "fc2": 3}],
    "dropout": [0.3],
    "r": [2, 1],
    "alpha": [5],
    "scaling": [0.7],
    "seed": [7],
    # AdaLoRA
    "target_r": [2],
    "init_r": [4],
    "tinit": [1],
    "tfinal": [2],
    "deltaT": [3],
    "beta1": [0.5],
    "beta2": [0.5],
    "orth_reg_weight": [0.1],
    "total_step": [20],
    # BOFT, C3A, CPT, DEFT, DeLoRA, FourierFT, GraLoRA, IA³, Lily
    "boft_block_size": [2],
    "boft_block_num": [2],
    "boft_n_butterfly_factor": [2],
    "block_size": [2],
    "block_size_pattern": [{"fc1": 2}, {"layers.0.fc1": 4, ".*fc2": 2}],
    "init_scale": [0.5],
    "delora_lambda": [7],
    "lambda_pattern": [{"fc1": 4}],
    "n_frequency": [12],
    "n_frequency_pattern": [{"fc1": 5}],
    "hybrid_r": [2],
    "GRALORA.r": [2, 6],
    "gralora_k": [4],
    "feedforward_modules": [["fc1"], ["fc1", "fc2"], r".*fc2"],
    "stride_A": [2],
    "num_B": [3],
    # LoKr, MiSS, OFT, OSF, PEANuT, Poly
    "decompose_factor": [2],
    "mini_r": [2],
    "oft_block_size": [2],
    "OFT.r": [2],
    "eps": [0.3],
    "num_cayley_neumann_terms": [3, 8],
    "effective_rank": [2, 0.25],
    "LOKR.r": [1],
    "LOKR.rank_pattern": [{"fc1": 1}, {"layers.1.fc1": 1, r".*fc2": 4}],
    "OSF.rank_pattern": [{"fc1": 2}, {"0.fc2": 0.25}],
    "target_svd_config": [{"fc1": 3}],
    "depth": [1, 2],
    "POLY.r": [2],
    "n_tasks": [3],
    "n_skills": [2],
    "n_splits": [2],
    # prompts
    "num_virtual_tokens": [4],
    "token_dim": [12],
    "num_transformer_submodules": [2],
    "num_attention_heads": [4],
    "num_layers": [1],
    "num_frozen_tokens": [0, 2],
    "encoder_hidden_size": [6],
    "encoder_num_layers": [1],
    "num_ranks": [2],
    "num_tasks": [3],
    "prompt_tuning_init_text": ["sort this"],
    "prompt_tuning_init_task": [1],
    "prompt_tuning_init_state_dict_path": [SOURCE],
    "tokenizer_name_or_path": ["someone/tokenizer"],
    "tokenizer_kwargs": [{"use_fast": True}],
    "cpt_token_ids": [[5, 2]],
    "cpt_mask": [[1, 1, 1, 0]],
    "cpt_tokens_type_mask": [[1, 2, 3, 4]],
    "opt_loss_decay_factor": [0.7],
    "opt_projection_epsilon": [0.3],
    "opt_projection_format_epsilon": [0.4],
    "adapter_len": [2],
    "adapter_layers": [2],
    # VeRA and its like, RoAd, SHiRA, Super-Tuning, TinyLoRA, tokens, UniLoRA, VB-LoRA
    "d_initial": [0.5],
    "projection_prng_key": [5],
    "generator_seed": [5],
    "randlora_alpha": [5],
    "RANDLORA.r": [3],
    "group_size": [2],
    "random_seed": [5],
    "random_loc_seed": [5],
    "sparsity": [0.5],
    "u": [5],
    "weight_tying": [0.5, 1.0],
    "projection_seed": [5],
    "init_v_bound": [0.5],
    "TINYLORA.init_weights": ["uniform"],
    "token_indices": [[2], [7, 0, 3]],
    "theta_d_length": [20],
    "proj_seed": [5],
    "init_theta_d_bound": [0.5],
    "num_vectors": [7],
    "vector_length": [2],
    "topk": [1, 3],
    "init_vector_bank_bound": [0.5],
    "init_logits_std": [0.5],
    # LoRA's own
    "init_lora_weights": ["pissa_niter_2", "lora_ga"],
    "ADALORA.rank_pattern": [
        {f"body.layers.{i}.fc{j}.lora_E": [True, False, True] for i in (0, 1) for j in (1, 2)}],
    "trainable_token_indices": [[1, 4], {"embed_tokens": [2]}],
    "target_parameters": [["fc1.weight"]],
    "layer_replication": [[[0, 2], [1, 2]]],
    "alora_invocation_tokens": [[5, 2]],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "megatron_core": ["megatron.other"],
    "qalora_group_size": [8],
    **{f"{name}_config": [{}] for name in
       ("corda", "eva", "kasa", "lora_ga", "monteclora", "runtime", "velora")},
    "arrow_config": [{"top_k": 2}],
    "loftq_config": [{"loftq_bits": 8}],
    "use_bdlora": [{"target_modules_bd_a": ["fc1"], "match_strict": False, "nblocks": 2}],
    # within its fields
    "arrow_config.rng_seed": [5],
    "arrow_config.router_temperature": [0.5],
    "arrow_config.top_k": [1],
    "corda_config.cache_file": ["cache"],
    "corda_config.covariance_file": ["covariance"],
    "eva_config.label_mask_value": [-1],
    "eva_config.rho": [1.5],
    "eva_config.tau": [0.5],
    "kasa_config.beta": [0.5],
    "kasa_config.gamma": [0.5],
    "loftq_config.loftq_bits": [8],
    "loftq_config.loftq_iter": [3],
    "lora_ga_config.stable_gamma": [8],
    "monteclora_config.buffer_size": [7],
    "monteclora_config.dirichlet_prior": [0.5],
    "monteclora_config.kl_loss_weight": [0.1],
    "monteclora_config.num_samples": [3],
    "monteclora_config.sample_scaler": [0.1],
    "use_bdlora.nblocks": [1, 4],
    "use_bdlora.target_modules_bd_a": [None, ["fc"], ["layers.1.fc1", "0.fc2"]],
    "use_bdlora.target_modules_bd_b": [["fc2"], ["1.fc2"]],
    "velora_config.num_groups": [4],
    "velora_config.scale": [0.5],
}  # fmt: skip
"""By ``_dropout``, ``_alpha`` and such, too, which end the names of many fields."""
NESTED: dict[str, dict[str, Any]] = {
    "use_bdlora": {"target_modules_bd_a": ["fc1"], "match_strict": False, "nblocks": 2},
}
"""What a configuration within a field starts from."""
WITH: dict[str, dict[str, Any]] = {
    "fan_in_fan_out": {"target_modules": ["c1d"]},
    "BOFT.fan_in_fan_out": {},
    "OFT.fan_in_fan_out": {},
    "SHIRA.fan_in_fan_out": {},
    "layers_pattern": {"layers_to_transform": [1]},
    "use_effective_conv2d": {"r": 1, "target_modules": ["conv"]},
    "boft_n_butterfly_factor": {"boft_block_size": 2, "target_modules": ["fc1"]},
    "decompose_both": {"r": 1},
    "mini_r": {"init_weights": "mini"},
    "eps": {"coft": True},
    "rank_dropout_scale": {"rank_dropout": 0.2},
    "proportional_parameters": {"target_modules": ["fc1", "score"]},
    "init_v_bound": {"init_weights": "uniform"},
    "init_lora_weights": {"r": 2},
    "use_bdlora": {"r": 4},
    "init_scale": {"init_weights": False},
    "prompt_tuning_init_text": TEXT,
    "tokenizer_kwargs": TEXT,
    "prompt_tuning_init_task": {**OF_SOURCE, "prompt_tuning_init": "EXACT_SOURCE_TASK"},
    "encoder_num_layers": {"encoder_reparameterization_type": "LSTM"},
    "PREFIX_TUNING.encoder_hidden_size": {"prefix_projection": True},
    "opt_projection_epsilon": {"cpt_tokens_type_mask": [1, 2, 3, 4]},
    "opt_loss_decay_factor": {"opt_weighted_loss_type": "decay"},
    "lora_bias": {"target_modules": ["fc1"]},
}
"""What goes with a field, that it acts."""
TOO: dict[str, dict[str, Any]] = {
    "boft_block_num": {"boft_block_size": 0},
    "OFT.r": {"oft_block_size": 0},
    "target_parameters": {"target_modules": []},
    "prompt_tuning_init=TEXT": TEXT,
    **{
        f"prompt_tuning_init={name}": OF_SOURCE
        for name in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
    },
    "prefix_projection": {"encoder_hidden_size": 6},
}
"""What a value asks for, which cannot stand without it."""

VARIANT = Idle("AdaLoRA has none of LoRA's variants")
STARTS = Idle("AdaLoRA starts alike whatever the name")
ORDER = "the places follow from the order of the layers"
SPARE = "no data to start from: LoRA's uniform start stands, as in Hugging Face PEFT"
PROMPTS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING",
           "P_TUNING")  # fmt: skip
TREATED: dict[str, Treatment | None] = {
    "auto_mapping": NOTE,
    "base_model_name_or_path": NOTE,
    "peft_version": NOTE,
    "revision": NOTE,
    "inference_mode": TRAINING,
    "dropout": TRAINING,
    "rank_dropout_scale": TRAINING,
    "fan_in_fan_out": Idle("Hugging Face PEFT sets it by the layer's class"),
    # AdaLoRA
    **{f"ADALORA.{name}": TRAINING for name in
       ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "total_step")},
    **{f"ADALORA.{name}": VARIANT for name in
       ("r", "use_rslora", "alpha_pattern", "lora_bias", "alora_invocation_tokens",
        "arrow_config", "kasa_config", "megatron_config", "monteclora_config", "use_bdlora",
        "use_qalora", "velora_config")},
    **{f"ADALORA.init_lora_weights={name}": STARTS for name in
       ("gaussian", "olora", "pissa", "eva", "orthogonal", "mica", "corda", "lora_ga",
        "pissa_niter_2")},
    "ADALORA.init_lora_weights=pissa_niter_[number of iters]": Refused("it is no name, but a rule"),
    "ADALORA.init_lora_weights=loftq": Never("loftq_config"),
    "num_frozen_tokens": TRAINING,
    "ADALORA.use_dora=True": Never("ADALORA does not support DoRA"),
    "ADALORA.target_parameters": Refused("AdaLoRA adapts modules alone"),
    # LoRA and its kin
    **{f"{name}_config": Idle("it acts with an init of that name alone") for name in
       ("corda", "eva", "loftq", "lora_ga")},
    **{name: Idle("it acts with an init of that name alone") for name in
       ("corda_config.cache_file", "corda_config.covariance_file", "corda_config.corda_method",
        "corda_config.verbose", "corda_config.use_float16_for_covariance",
        "corda_config.prune_temporary_fields", "eva_config.rho", "eva_config.tau",
        "eva_config.use_label_mask", "eva_config.label_mask_value", "eva_config.whiten",
        "eva_config.adjust_scaling_factors", "loftq_config.loftq_bits",
        "loftq_config.loftq_iter", "lora_ga_config.direction", "lora_ga_config.scale",
        "lora_ga_config.stable_gamma")},
    **dict.fromkeys(
        ("kasa_config.beta", "kasa_config.gamma", "monteclora_config.use_entropy",
         "monteclora_config.dirichlet_prior", "monteclora_config.sample_scaler",
         "monteclora_config.kl_loss_weight", "velora_config.scale",
         "velora_config.init_type=batch_average_once"), TRAINING),
    "use_bdlora.match_strict=True": Never("not matched|neither"),
    "runtime_config.ephemeral_gpu_offload": Idle("it moves arrays between devices"),
    **{f"arrow_config.{name}": Elsewhere(
        "test_experts.py::test_a_router_is_read_where_hf_saved_it") for name in
       ("top_k", "router_temperature", "use_gks", "rng_seed")},
    "megatron_core": Idle("it acts with megatron_config alone"),
    "qalora_group_size": Idle("it acts with use_qalora alone"),
    "runtime_config": Idle("it moves arrays between devices"),
    "LORA.megatron_config": Kept("its parallel layers are merged as any"),
    "LORA.arrow_config": Elsewhere("test_experts.py::test_a_router_is_read_where_hf_saved_it"),
    "use_qalora": Refused("QALoRA needs its quantised base"),
    "ensure_weight_tying": Elsewhere("test_tied.py::test_tied_embeddings_act_as_in_hf"),
    **{f"init_lora_weights={name}": Refused(LORA_INIT) for name in
       ("corda", "loftq", "lora_ga", "pissa_niter_2", "pissa_niter_[number of iters]")},
    "LORA.init_lora_weights=eva": Read("it needs the layer's inputs"),
    "LORA.init_lora_weights=mica": Elsewhere("test_live.py::test_what_hf_writes_we_read"),
    "LORA.init_lora_weights=olora": Elsewhere("test_live.py::test_what_hf_writes_we_read"),
    "LORA.init_lora_weights=pissa": Elsewhere("test_live.py::test_what_hf_writes_we_read"),
    "layer_replication": Elsewhere(
        "test_replication.py::test_merged_on_the_repeated_base_it_is_their_model"),
    "LORA.alora_invocation_tokens": Elsewhere(
        "test_routed.py::test_a_model_with_activated_lora_is_hfs"),
    # other methods
    "HIRA.rank_pattern": Idle("Hugging Face PEFT reads it for an adapter beside others alone"),
    "OSF.target_svd_config": Idle("Hugging Face PEFT reads no such field"),
    "PVERA.generator_seed": Idle("it acts with sample_at_inference alone"),
    "PVERA.sample_at_inference": Elsewhere("test_fields.py::test_pveras_samples_are_around_ours"),
    "C3A.init_weights=False": Idle("Hugging Face PEFT starts alike"),
    "TINYLORA.init_weights=False": Idle("the start alone is another"),
    "PEANUT.act_fn=relu6": Alike("no value is above 6"),
    "PEANUT.act_fn=prelu": Elsewhere(
        "../test_activations.py::test_activations_are_those_of_transformers"),
    "TINYLORA.save_projection": Elsewhere(
        "test_tinylora.py::test_a_fresh_adapter_means_the_same_in_hf"),
    "UNILORA.save_indices": Elsewhere("test_unilora.py::test_several_layers_are_read_and_written"),
    "VBLORA.save_only_topk_weights": Elsewhere(
        "test_vblora.py::test_short_files_are_read_and_written"),
    **{f"ADAPTION_PROMPT.{name}": Elsewhere("test_attended.py::test_what_hf_writes_we_read") for
       name in ("adapter_len", "adapter_layers", "target_modules", "task_type", "inference_mode")},
    **{f"ADAMSS.{name}": TRAINING for name in
       ("use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval",
        "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent")},
    "FROD.save_projection": Elsewhere("test_frod.py::test_a_file_without_v_is_refused"),
    "FROD.progressbar": Idle("it says how far the start is"),
    "FROD.runtime_offload_base_weight": Idle("it moves arrays between devices"),
    "XLORA.xlora_dropout_p": TRAINING,
    # prompts
    **{f"{method}.task_type={name}": Elsewhere(
        "test_attach_prompts.py::test_outputs_and_losses_are_hfs") for method in PROMPTS for name in
       ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM")},
    **{f"{method}.modules_to_save": Idle("a prompt saves modules beside a classifier alone") for
       method in PROMPTS},
    **{f"{method}.num_attention_heads": Idle("a size of the model, which no prompt has") for
       method in ("MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING", "CPT")},
    **{f"{method}.task_type=SEQ_2_SEQ_LM": None for method in PROMPTS},
    "tokenizer_name_or_path": Idle("it acts with an init of text alone"),
    "tokenizer_kwargs": TRAINING,
    "P_TUNING.inference_mode": None,  # it makes no encoder
    "CPT.inference_mode": None,  # it starts from no tokens
    "cpt_mask": TRAINING,
    "opt_weighted_loss_type": TRAINING,
    "opt_loss_decay_factor": TRAINING,
    "CPT.num_virtual_tokens": Idle("the tokens are counted"),
    "CPT.num_transformer_submodules": Idle("it is for decoders alone"),
    "prompt_tuning_init_state_dict_path": Idle("it acts with an init of a source alone"),
    "encoder_dropout": TRAINING,
    "LN_TUNING.modules_to_save=score": Never("it takes the characters for names"),
    **{f"LN_TUNING.task_type={name}": Called("it leaves its wrapper around the saved module") for
       name in ("QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS")},
    "LN_TUNING.modules_to_save": Called("it leaves its wrapper around the saved module"),
    **{f"TRAINABLE_TOKENS.task_type={name}": Never("NoneType") for name in
       ("QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS")},
    "layers_pattern": Alike("the pattern that is guessed is this one"),
    **{f"task_type={name}": Alike("no module is saved for it, and the net has no other use") for
       name in ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")},
    "wavelet_family=haar": Never("not supported"),
    "wavelet_family=coif5": Never("shapes cannot be multiplied"),
}  # fmt: skip
APART: dict[str, Elsewhere] = {
    "ADAMSS": Elsewhere("test_adamss.py::test_a_fresh_adapter_is_hfs_up_to_signs"),
    "FROD": Elsewhere("test_frod.py::test_hf_refuses_ours_since_it_would_pair_it_with_its_own_u"),
    "PSOFT": Elsewhere(
        "test_live.py::test_hf_refuses_our_file_where_it_would_take_arrays_of_its_own"),
    "XLORA": Elsewhere("test_xlora.py::test_what_hf_saves_is_read_and_what_we_save_hf_loads"),
}  # fmt: skip
"""Methods whose files of PEFT's do not mean by themselves what they say: they have tests of their
own. Their fields have rows, too."""
SHARED = ("task_type", "target_modules", "exclude_modules", "layers_to_transform",
          "layers_pattern", "modules_to_save")  # fmt: skip
"""Fields that act alike in all methods: LoRA is tried with every value, the others by turns."""


ROWLESS: dict[str, str] = {
    "bias": "it acts on the other biases of a model",
    "trainable_token_indices": "it acts on a model's embedding",
    "num_transformer_submodules": "a size of the model",
    "num_layers": "a size of the model",
    "inference_mode": "the start alone is another",
    "MULTITASK_PROMPT_TUNING.prompt_tuning_init": "the start alone is another",
    "prompt_tuning_init_text": "the start alone is another",
    "prompt_tuning_init_task": "the start alone is another",
    "LORA.velora_config": "it acts in training alone, but draws numbers first",
    "LORA.monteclora_config": "it acts in training alone, but draws numbers first",
    "monteclora_config.num_samples": "it sizes what acts in training alone",
    "velora_config.num_groups": "it sizes what acts in training alone",
    "velora_config.init_type": "it draws what acts in training alone",
    "monteclora_config.buffer_size": "it acts in training alone, but draws numbers first",
    **{
        f"use_bdlora.{name}": "rows have both factors, and neither"
        for name in ("nblocks", "target_modules_bd_a", "target_modules_bd_b")
    },
    **{
        f"XLORA.{name}": "compared in tests/hf/test_xlora.py"
        for name in (
            "enable_softmax",
            "enable_softmax_topk",
            "softmax_temperature",
            "scaling_pass_value",
        )
    },
    "PEANUT.act_fn": "the functions are compared one by one in tests/test_activations.py",
    "SUPERTUNING.save_precomputed_indices": "its places are found again, on the host alone",
    "WAVEFT.wavelet_family": "a family is a list of numbers; every kind has a row",
}
"""What acts without a row of tests/cases.py, and why; it is compared live, in the sweep."""


def keys_of(method: str, field: str, value: Any = None) -> tuple[str, ...]:
    """Name a setting as the tables do, from the narrowest name to the widest."""
    own = f"{method}.{field}"
    return f"{own}={value}", own, f"{field}={value}", field, field.rpartition("_")[2]


def looked_up(table: Mapping[str, T], method: str, field: str, value: Any = None) -> T | None:
    """Find what a table says of a field, or of a value of it."""
    return next((table[k] for k in keys_of(method, field, value) if k in table), None)
