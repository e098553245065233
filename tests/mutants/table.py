"""One-line mistakes, by the tests that should notice them: (file, instead of, this). Whatever a flag, a seed, a schedule, a mode, a
share or a process group decides should be decided otherwise here."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands once in `file`; `tests` are pytest's node ids, several apart by |."""

    file: str
    old: str
    new: str
    tests: str


def story(layout: str, cases: str) -> str:
    return f"tests/test_methods.py::test_iterations_equal_float64_transformers[{layout}-{cases}]"


def family(case: str) -> str:
    return f"tests/test_families.py::test_iterations_equal_float64_transformers[{case}]"


def of(file: str, *names: str) -> str:
    return "|".join(f"tests/{file}.py::test_{name}" for name in names)


ONE, TP2, PP2 = "one rank, 4 micro-batches", "TP2, 2 micro-batches", "PP2, 4 micro-batches"
SP, DP2 = "TP2 PP2 SP, 4 micro-batches", "DP2 distributed optimizer, 4 micro-batches"
OPTIMIZER, SCHEDULES, TRAINER = "megakd/optimizer.py", "megakd/schedules.py", "megakd/trainer.py"
CONFIG, METHODS, LOSSES, MODELS, DATA = "megakd/config/", "megakd/methods/", "megakd/losses/", "megakd/models/", "megakd/data/"
RUNTIME, GENERATION, CHECKPOINTS = "megakd/runtime/", "megakd/generation/", "megakd/checkpointing/"
TEACHERS = "megakd/teachers/"
EVALUATION, REPORTING, KERNELS = "megakd/evaluation/", "megakd/reporting/", "kernels/megakd_kernels/"
TEACHERS = "megakd/teachers/"

GROUPS: dict[str, list[tuple[str, str, str]]] = {
    of("test_begun_with", "what_has_changed_is_named"): [
        ("megakd/begun_with.py", "read(Path(save)) or sums, sums", "sums, sums"),
        ("megakd/begun_with.py", "if is_template(flat[name])}", "if False}"),
        ("megakd/begun_with.py", "for name in DATA if flat[name]}", "for name in DATA[:1] if flat[name]}"),
        ("megakd/dry_run.py", "    if continues(config):", "    if False:"),
    ],
    of("test_begun_with", "a_run_goes_on_where_its_files_lie_now_and_not_with_others"): [
        ("megakd/begun_with.py", "on_rank_zero(lambda: continues and check", "on_rank_zero(lambda: False and check"),
        ("megakd/begun_with.py", "if self.files == [Path(self.path)]:", "if False:"),
        ("megakd/preflight.py", "(beside_places(one) if has_sums else one.flat()", "(one.flat()"),
    ],
    of("test_begun_with", "hosts_read_the_same_files"): [
        ("megakd/begun_with.py", "differences(everyone[0], sums or everyone[0])", "differences(everyone[0], everyone[0])"),
        ("megakd/begun_with.py", "hosts.index(hosts[dist.get_rank()]) == dist.get_rank()", "dist.get_rank() == 0"),
    ],
    of("test_begun_with", "a_run_of_a_version_that_kept_no_checksums_goes_on_and_keeps_them"): [
        ("megakd/trainer.py", "if self.iteration == 0 or begun_with.read(self.folder) is None:", "if self.iteration == 0:"),
    ],
    of("test_relayed_teachers", "an_error_of_the_students_ranks_is_heard_by_the_teachers_own"): [
        ("megakd/loading.py", "agreed(lambda: places.student and load_model(self.student, places.student, **options, **student))", "places.student and load_model(self.student, places.student, **options, **student)"),
        ("megakd/trainer.py", "            agreed(self._begin_to_write)", "            self._begin_to_write()"),
        ("megakd/checkpointing/training.py", "    agreed(lambda: _check_complete(native, state, flag=flag))", "    _check_complete(native, state, flag=flag)"),
    ],
    of("test_relayed_teachers", "what_one_stage_cannot_load_is_told_on_all_before_the_teacher_is_made"): [
        ("megakd/loading.py", "learner = agreed(lambda: places.student and", "learner = (lambda make: make())(lambda: places.student and"),
    ],
    of("test_async_save", "what_rank_zero_alone_meets_while_it_saves_or_exports_all_ranks_say"): [
        ("megakd/checkpointing/training.py", "        agreed(lambda: stage(folder), strategy.group)", "        stage(folder)"),
        ("megakd/trainer.py", "        agreed(lambda: is_rank_zero() and work())", "        is_rank_zero() and work()"),
    ],
    of("test_async_save", "of_two_errors_the_first_is_told_and_the_teachers_own_ranks_are_dismissed"): [
        ("megakd/trainer.py", "with suppress(UserError):  # the first is told", "with nullcontext():"),
    ],
    of("test_meeting", "a_launcher_that_is_told_to_stop_while_it_waits_for_others_ends_at_once"): [
        ("megakd/launch.py", "        self._pcontext = None  # those", "        # those"),
    ],
    of("test_verify", "ranks_that_are_no_layout_of_the_flags_are_told"): [("megakd/verify.py", "if started != config.ranks:", "if False:")],
    "tests/test_quiet_pipe.py": [
        ("megakd/errors.py", "if not any(event & select.POLLERR", "if True or not any(event & select.POLLERR"),
        ("megakd/errors.py", "    with quiet_pipe():\n        try:", "    with suppress():\n        try:"),
        ("megakd/config/parse.py", "        with quiet_pipe():", "        with contextlib.nullcontext():"),
    ],
    of("test_hub_cache", "a_base_whose_name_is_no_path_is_told"): [
        ("megakd/models/hub_cache.py", "if os.path.exists(path) or", "if path.exists() or"),
    ],
    "tests/test_lora.py::test_a_run_equals_peft": [
        (MODELS + "lora.py", "config.lora_alpha / config.rank, config.lora_dropout", "1.0, config.lora_dropout"),
        (MODELS + "lora.py", "self.A.sequence_parallel = linear.sequence_parallel", "self.A.sequence_parallel = False"),
        (MODELS + "lora.py", "self.B.sequence_parallel = linear.sequence_parallel", "self.B.sequence_parallel = False"),
        (MODELS + "lora.py", "return copy_to_tensor_model_parallel_region(hidden, group=self.group)", "return hidden"),
        (MODELS + "lora.py", "tensor_parallel_output_grad=True", "tensor_parallel_output_grad=False"),
        (MODELS + "lora.py", "set_tensor_model_parallel_attributes(self.B, True, 0, 1)", "pass"),
        (MODELS + "lora.py", "model.requires_grad_(False)", "pass"),
        (CHECKPOINTS + "peft_folder.py", "torch.empty_like(B).index_copy_(0, rows, B)", "B"),
        (CHECKPOINTS + "peft_folder.py", "delta.t() if transposed else delta", "delta.t()"),
    ],
    family("TP2-qwen3"): [
        (MODELS + "qwen3.py", '{"qk_layernorm": True}', '{"qk_layernorm": False}'),
    ],
    family("TP2-opt-350m"): [
        (MODELS + "gpt_model.py", "torch.arange(x.shape[1], device=x.device)", "torch.zeros(x.shape[1], dtype=torch.long, device=x.device)"),
    ],
    family("PP2-opt-350m"): [
        (MODELS + "narrow_words.py", "    if model.pre_process or model.post_process:", "    if False:"),
    ],
    family("TP2-qwen3-moe"): [
        (MODELS + "sparse_mlp.py", "(copy_to_tensor_model_parallel_region(y, group=group) for y", "(y for y"),
        (MODELS + "sparse_mlp.py", "if self.routing.normalised:", "if False:"),
    ],
    family("TP2 PP2 SP-qwen3-moe"): [
        (MODELS + "sparse_mlp.py", "tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True"),
    ],
    "tests/test_families.py::test_gemmas_embeddings_are_scaled_as_transformers_rounds_the_scale": [
        (MODELS + "gpt_model.py", "torch.tensor(embedding_scale).to(config.params_dtype).item()", "embedding_scale"),
        (MODELS + "soft_prompt.py", "model.word_embeddings(torch.tensor", "model.embedding.word_embeddings(torch.tensor"),
    ],
    "tests/test_families.py::test_a_sparse_models_step_is_not_captured": [
        (GENERATION + "rows.py", "and all(has_fixed_steps(component.model) for component in components)", ""),
    ],
    "tests/test_lora.py::test_all_linear_is_refused_where_it_would_be_less_than_pefts": [
        (MODELS + "lora.py", 'WITHOUT = ("project_in", "experts")', "WITHOUT = ()"),
    ],
    "tests/test_families.py::test_hidden_states_as_narrow_as_the_head_travel": [
        ("megakd/teachers/relayed.py", "model.embedding_size", "model.config.hidden_size"),
    ],
    of("test_models", "logits_equal_transformers[1-1-1-False]"): [
        (MODELS + "smollm3.py", "int(not turns)", "int(turns)"),
        (MODELS + "llama.py", "(hf.sliding_window - 1, 0)", "(hf.sliding_window, 0)"),
        (MODELS + "llama.py", 'int(kind == "sliding_attention")', "1"),
        (MODELS + "opt.py", "return LAYER if hf.do_layer_norm_before else POST_NORM", "return LAYER"),
        (MODELS + "opt.py", "and not hf._remove_final_layer_norm", ""),
        (MODELS + "gemma3.py", '"softmax_scale": hf.query_pre_attn_scalar**-0.5', '"softmax_scale": None'),
        (MODELS + "layer_specs.py", "1 + self.weight.float()", "self.weight.float()"),
        (MODELS + "transformer_layer.py", "0 if self.core_attention.window is None else -1", "0"),
    ],
    "tests/test_generation.py::test_greedy_tokens_are_those_of_transformers": [
        (GENERATION + "decoder.py", "torch.where(self.columns_L < self.soft_length, self", "torch.where(self.columns_L < 0, self"),
        (GENERATION + "decoder.py", "(own - columns < window)", "(own - columns <= window)"),
    ],
    "tests/test_checksums.py": [
        (CHECKPOINTS + "checksums.py", "return int(found[1]) % ranks if found else 0", "return 0"),
        (CHECKPOINTS + "native.py", "verify(self.folder, rank=rank, ranks=ranks)", "pass"),
        (CHECKPOINTS + "native.py", "*filter(lambda path: path < lost, others), *others", "*others"),
        (CHECKPOINTS + "space.py", "if (free := shutil.disk_usage(place).free) < needed:", "if False:"),
        (CHECKPOINTS + "export_hf.py", "    native.verify()\n", ""),
        ("megakd/preflight.py", "if asked.isdecimal():", "if False:"),
        (TRAINER, "remove_left_behind(self.folder, self.checkpoints)", "pass"),
    ],
    "tests/test_faults.py": [
        ("megakd/faults.py", "if not math.isfinite(value):", "if False:"),
        ("megakd/faults.py", "sorted(everywhere(mine, student.layout)", "sorted(mine"),
        (OPTIMIZER, "        if not math.isfinite(norm):\n            raise", "        if False:\n            raise"),
        (METHODS + "base.py", "check_finite(step, batches, context, loss)", "pass"),
        (TRAINER, "if not all_finite(self.method.student):", "if False:"),
        (TRAINER, 'self.config.running.on_nonfinite == "stop"', "True"),
    ],
    "tests/test_one_run.py": [
        (RUNTIME + "lock.py", "start_of(self.process) == self.started", "True"),
        (RUNTIME + "lock.py", "return not (self.job and self.job == me.job)", "return True"),
        (RUNTIME + "lock.py", "fcntl.flock(stream, fcntl.LOCK_EX)", "pass"),
        ("megakd/preflight.py", "if given.get(name) != value), None)", "if False), None)"),
    ],
    "tests/test_async_save.py": [
        (CHECKPOINTS + "torch_dist_save.py", '.to("cpu", copy=True)', '.to("cpu")'),
        (RUNTIME + "background.py", "if has_failed or not is_at_work:", "if False:"),
        (TRAINER, "in_background=self.config.output.async_save", "in_background=False"),
        (TRAINER, "self._on_all_ranks(settle)\n        soft_prompt", "soft_prompt"),
        (CHECKPOINTS + "training.py", "        if keep_last:\n", "        if False:\n"),
    ],
    "tests/test_stop.py": [
        (RUNTIME + "stop.py", "dist.ReduceOp.MAX", "dist.ReduceOp.MIN"),
        (RUNTIME + "stop.py", "args=(reader, megakd.STARTED_BY)", "args=(reader, os.getppid())"),
        (RUNTIME + "stop.py", "if self.reason or self.is_lost():", "if self.reason:"),
        (RUNTIME + "stop.py", "time.monotonic() - self.since < TOGETHER", "False"),
        (METHODS + "minillm.py", "return iteration % self.steps_per_phase == 0", "return True"),
        (TRAINER, "if self.iteration > self.saved:", "if False:"),
        (TRAINER, "self.teacher.on_teacher_ranks(agree_to_stop)", "pass"),
    ],
    "tests/test_pytorch_files.py": [
        (MODELS + "pytorch_file.py", "mmap=True, weights_only=True", "mmap=True, weights_only=False"),
        (MODELS + "pytorch_file.py", "mmap=True, weights_only=True", "mmap=False, weights_only=True"),
        (MODELS + "hf_checkpoint.py", "tensor if index is None else tensor[index]", "tensor"),
    ],
    "tests/test_lora.py::test_a_checkpoint_holds_adapters_alone_and_continues_to_the_bit": [
        (CHECKPOINTS + "training.py", "if not is_frozen(value)} if model.adapted", "} if model.adapted"),
    ],
    "tests/test_lora.py::test_a_student_with_adapters_writes_and_learns_the_same_at_every_layout": [
        (MODELS + "gpt_model.py", "embedded.requires_grad_()", "pass"),
    ],
    of("test_generation", "steps_are_captured_once_a_run_and_serve_every_iteration[llama]"): [
        (GENERATION + "decoder.py", "(self.prompts_end + step[None]) % self.ring", "(self.width + step[None]) % self.ring"),
        (GENERATION + "room.py", "and self.addresses == addresses(components)", ""),
        (GENERATION + "room.py", "replace(sampler.sampling, seed=0, max_new_tokens=1)", "0"),
        (GENERATION + "room.py", "all(has >= needs for has, needs in zip(self.columns, columns))", "True"),
        (GENERATION + "rows.py", "size // 2 >= max(live, 1)", "size > max(live, 1)"),
    ],
    of("test_num_generations", "one_prompt_beside_which_others_are_read_is_not_read_once"): [
        (GENERATION + "rows.py", "row.prompts != reading[-1].prompts", "row.prompt != reading[-1].prompt"),
    ],
    of("test_stored_teacher", "a_stage_that_takes_no_loss_reads_nothing"): [
        (TEACHERS + "stored.py", "for batch in batches] if to.is_last_stage else []", "for batch in batches]"),
    ],
    of("test_num_generations", "the_first_answer_is_the_one_of_a_run_without_and_the_others_differ"): [
        (GENERATION + "rows.py", "self.room.streams_B[seats] = noise", "self.room.streams_B[seats] = 0 * noise"),
    ],
    "tests/gpu_simulation/test_iterations.py": [
        (GENERATION + "decoder.py", 'filled if self.device.type == "cpu" else min(aligned(filled), len(self.columns_L))', "filled"),
    ],
    of("test_num_generations", "a_prompt_is_read_once_and_its_answers_are_those_of_prompts_read_alone"): [
        (GENERATION + "rows.py", "row.prompts != reading[-1].prompts", "True"),
        (GENERATION + "decoder.py", "self.cache.copy(first + of_B, first, self.filled(end))", "pass"),
        (GENERATION + "decoder.py", "self.cache.copy(first + of_B, first, self.filled(end))", "self.cache.copy(of_B, first, self.filled(end))"),
    ],
    of("test_num_generations", "the_first_answer_is_the_one_of_a_run_without_and_the_others_differ"): [
        (GENERATION + "sampling.py", "i + g * GENERATION_STRIDE", "i"),
        (GENERATION + "sampling.py", "i + g * GENERATION_STRIDE", "i + (g + 1) * GENERATION_STRIDE"),
    ],
    of("test_num_generations", "a_method_learns_every_answer_at_every_layout[promptkd]"): [
        (METHODS + "rollout.py", "[sample.generation for sample in samples]", "[0 for sample in samples]"),
        (DATA + "dataloader.py", "split_across_dp(self._rows(iteration), self.dp_size)[self.dp_rank]", "self._rows(iteration)"),
    ],
    of("test_continuous_batching", "rows_that_follow_others_say_what_they_say_alone"): [
        (GENERATION + "decoder.py", "self.soft_length + lengths_U - joined", "self.soft_length + lengths_U"),
        (GENERATION + "decoder.py", "self.positions(end - lengths_U)", "self.positions(self.width - lengths_U)"),
        (GENERATION + "room.py", "step - self.joined_B[rows]", "step + 0 * self.joined_B[rows]"),
    ],
    of("test_trainer", "a_run_continues_at_another_layout"): [
        ("megakd/run_data.py", "num_generations=config.generation.num_generations", "num_generations=1"),
    ],
    of("test_continuous_batching", "no_place_is_empty_while_a_row_waits"): [
        (GENERATION + "rows.py", "min(len(self.waiting), self.capacity - len(live))", "min(len(self.waiting), 1)"),
    ],
    of("test_continuous_batching", "a_captured_step_is_that_of_the_rows_that_follow_as_well"): [
        (GENERATION + "rows.py", "if step >= row.joined:", "if True:"),
        (GENERATION + "rows.py", "order[mover] = gap", "pass"),
    ],
    story(ONE, "sft and kd"): [
        (OPTIMIZER, "lr = learning_rate(iteration, lr=self.config.lr,", "lr = learning_rate(1, lr=self.config.lr,"),
        (OPTIMIZER, "adam_beta2=config.adam_beta2,", "adam_beta2=config.adam_beta1,"),
        (OPTIMIZER, "adam_beta1=config.adam_beta1,", "adam_beta1=0.9,"),
        (OPTIMIZER, "adam_eps=config.adam_eps,", "adam_eps=1e-8,"),
        (OPTIMIZER, "clip_grad=config.clip_grad,", "clip_grad=1.0,"),
        (OPTIMIZER, '= lr, self.config.weight_decay * group["wd_mult"]', "= lr, self.config.weight_decay"),
        (OPTIMIZER, '= lr, self.config.weight_decay * group["wd_mult"]', '= lr, 0.0 * group["wd_mult"]'),
        (OPTIMIZER, 'return {"grad_norm": float(grad_norm), "lr": lr}', 'return {"grad_norm": float(grad_norm), "lr": self.config.lr}'),
        (OPTIMIZER, 'group["lr"], group["weight_decay"] = lr,', 'group["lr"], group["weight_decay"] = self.config.lr,'),
        (OPTIMIZER, "0.5 * (1 + math.cos(math.pi * progress))", "1 - progress"),
        (OPTIMIZER, "return lr * iteration / config.lr_warmup_iters", "return lr"),
        (OPTIMIZER, "lowest = min(config.min_lr, lr)", "lowest = 0.0"),
        (METHODS + "kd.py", "kd_ratio=1.0 if on_policy else ratio", "kd_ratio=ratio"),
        (METHODS + "kd.py", 'random.Random(f"{self.config.training.seed}/{iteration}")', "random.Random(self.config.training.seed)"),
        (METHODS + "kd.py", "ratio = self.config.distillation.ratio(USUAL_RATIO)", "ratio = USUAL_RATIO"),
        (METHODS + "kd.py", "settings.kd_temperature, settings.beta,", "1.0, settings.beta,"),
        (METHODS + "kd.py", "settings.beta, settings.skew_alpha", "0.5, settings.skew_alpha"),
        (METHODS + "rollout.py", "config.training.seed * SEED_STRIDE + iteration", "config.training.seed * SEED_STRIDE"),
        (METHODS + "rollout.py", "config.training.seed * SEED_STRIDE + iteration", "SEED_STRIDE + iteration"),
        (METHODS + "rollout.py", "temperature=settings.temperature", "temperature=1.0"),
        (METHODS + "rollout.py", "max_new_tokens=config.max_new_tokens", "max_new_tokens=256"),
        (LOSSES + "distillation.py", "label_coef=1 - kd_ratio, distance_coef=kd_ratio", "label_coef=kd_ratio, distance_coef=1 - kd_ratio"),
        (LOSSES + "distillation.py", '"temperature": self.temperature,', '"temperature": 1.0,'),
        (LOSSES + "distillation.py", '"beta": self.beta,', '"beta": 1 - self.beta,'),
        (SCHEDULES, "total / tokens.clamp(min=1)", "total"),
        (MODELS + "gpt_model.py", "if self.padding_idx is None or not torch.is_grad_enabled():", "if True:"),
        (MODELS + "family.py", "return hf.pad_token_id % hf.vocab_size", "return hf.pad_token_id"),
        (MODELS + "gpt2.py", "freezes_pad_input=False", "freezes_pad_input=True"),
    ],
    story(ONE, "promptkd"): [
        (OPTIMIZER, "betas = (config.adam_beta1, config.adam_beta2)", "betas = (config.adam_beta2, config.adam_beta1)"),
        (OPTIMIZER, "learning_rate(iteration, lr=self.lr,", "learning_rate(1, lr=self.lr,"),
        (OPTIMIZER, "learning_rate(iteration, lr=self.lr,", "learning_rate(iteration, lr=self.config.lr,"),
        (OPTIMIZER, "eps=config.adam_eps, weight_decay=config.weight_decay", "eps=1e-8, weight_decay=config.weight_decay"),
        (OPTIMIZER, "eps=config.adam_eps, weight_decay=config.weight_decay", "eps=config.adam_eps, weight_decay=0.0"),
        (OPTIMIZER, "self.prompt.parameters(), self.config.clip_grad or math.inf)", "self.prompt.parameters(), math.inf)"),
        (OPTIMIZER, "self.prompt.synchronize_gradient(tokens)", "self.prompt.synchronize_gradient(torch.ones_like(tokens))"),
        (METHODS + "promptkd.py", "self.config.promptkd.base_coef * (1 - iteration / self.total_iters)", "self.config.promptkd.base_coef"),
        (METHODS + "promptkd.py", "self.config.promptkd.base_coef * (1 - iteration / self.total_iters)", "1 - iteration / self.total_iters"),
        (METHODS + "promptkd.py", "if settings.teacher_lr is None else settings.teacher_lr", "if True else None"),
        (METHODS + "promptkd.py", "prompted = self.teacher.read_prompted(", "prompted = self.teacher.read("),
        (SCHEDULES, "list(zip(context, read(batches)))", "list(zip(read(batches), context))"),
        (METHODS + "promptkd.py", "self.optimizer.zero_grad()", "pass"),
        (MODELS + "gpt_model.py", "first = 0 if soft_prompt_PH is None else soft_prompt_PH.shape[0]", "first = 0"),
        (MODELS + "soft_prompt.py", "(list(token_ids) * length)[:length]", "(list(token_ids) * length)[-length:]"),
    ],
    story(ONE, "the others"): [
        (METHODS + "promptkd.py", "(settings.teacher_kld_type, settings.base_kld_type)", "(settings.base_kld_type, settings.teacher_kld_type)"),
        (LOSSES + "distillation.py", "loss = kd + base_coef * base", "loss = kd - base_coef * base"),
        (LOSSES + "distillation.py", '"alpha": self.alpha,', '"alpha": 0.1,'),
        (LOSSES + "distillation.py", "weights_N=-slope", "weights_N=slope"),
        (METHODS + "minillm.py", "self.teacher.model, self.settings.teacher_mixed_alpha, prompts=prompts)", "self.teacher.model, 1 - self.settings.teacher_mixed_alpha, prompts=prompts)"),
        (METHODS + "minillm.py", "first = phase * self.batches_per_phase", "first = iteration - 1"),
        (METHODS + "minillm.py", "(self.config.training.seed, phase, epoch)", "(self.config.training.seed, phase)"),
        (METHODS + "minillm.py", "(self.config.training.seed, phase, epoch)", "(self.config.training.seed, 0, epoch)"),
        (METHODS + "minillm.py", "(self.config.training.seed, phase, epoch)", "(1234, phase, epoch)"),
        (METHODS + "minillm.py", "scale=settings.reward_scaling", "scale=0.5"),
        (METHODS + "minillm.py", "limit=settings.cliprange_reward", "limit=100.0"),
        (METHODS + "minillm.py", "clip=self.settings.cliprange", "clip=0.2"),
        (METHODS + "minillm.py", "gamma=self.settings.gamma", "gamma=0.95"),
        (METHODS + "minillm.py", "length_norm=self.settings.length_norm", "length_norm=True"),
        (METHODS + "minillm.py", "alpha=settings.teacher_mixed_alpha)", "alpha=0.2)"),
        (METHODS + "minillm.py", "self.settings.lm_coef * text", "text"),
        (METHODS + "minillm.py", "self.config.distillation.ratio(USUAL_RATIO)", "USUAL_RATIO"),
        (METHODS + "minillm.py", 'Divergence("forward_kl")', 'Divergence("reverse_kl")'),
        (METHODS + "minillm.py", "if not self.settings.single_step_reg:", "if False:"),
        (METHODS + "minillm.py", "[counts.sum() / count.clamp(min=1) for count in counts]", "[1.0 for count in counts]"),
        (METHODS + "minillm.py", "self.text.samples(iteration - 1)", "self.text.samples(0)"),
        (METHODS + "minillm.py", "* self.settings.ppo_epochs", "* 4"),
        (LOSSES + "policy_gradient.py", "alpha * (log_p - log_q).exp()", "alpha * (log_q - log_p).exp()"),
        (LOSSES + "policy_gradient.py", "later = rewards_RT[:, t] + gamma * later", "later = rewards_RT[:, t] + later"),
        (LOSSES + "policy_gradient.py", "clamp(1 - clip, 1 + clip)", "clamp(1 - 2 * clip, 1 + clip)"),
        (LOSSES + "policy_gradient.py", "ratio_N = (log_q_N - old_log_q_N).exp() * weights_N", "ratio_N = (log_q_N - old_log_q_N).exp()"),
        (LOSSES + "policy_gradient.py", ".clamp(-limit, limit)", ".clamp(-1e9, limit)"),
        (METHODS + "distillm.py", "threshold * (1 - iteration / self.total_iters)", "threshold"),
        (METHODS + "distillm.py", 'random.Random(f"{self.config.training.seed}/{iteration}")', 'random.Random(f"{self.config.training.seed}")'),
        (METHODS + "distillm.py", "self.config.distillation.ratio(1.0)", "self.config.distillation.ratio(0.5)"),
        (METHODS + "seqkd.py", "ONCE = 0", "ONCE = 1"),
        (METHODS + "seqkd.py", "self.ends, ONCE)", "self.ends, len(self.written))"),
        (METHODS + "seqkd.py", "else 0.0", "else USUAL_RATIO"),
        (GENERATION + "generate.py", "MixtureComponent(model, 1 - sum(component.share for component in mix_with), soft_prompt)", "MixtureComponent(model, 1.0, soft_prompt)"),
    ],
    story(DP2, "sft and kd"): [
        (EVALUATION + "held_out.py", "in passes(shares[layout.dp_rank],", "in passes(shares[0],"),
        (SCHEDULES, "    layout.sum_over_data_parallel(sums)\n    *totals", "    *totals"),
        (RUNTIME + "parallel_layout.py", "dist.all_reduce(tensor, group=self.dp_group)", "dist.all_reduce(tensor, group=self.tp_group)"),
        (OPTIMIZER, "        use_distributed_optimizer=distributed,\n", "        use_distributed_optimizer=False,\n"),
    ],
    story(DP2, "the others"): [
        (METHODS + "minillm.py", "group=self.layout.dp_group, count=count", "group=None, count=count"),
        (METHODS + "minillm.py", "counts = self.layout.sum_over_data_parallel(torch.tensor(tokens).to(self.layout.device, non_blocking=True)).double()", "counts = torch.tensor(tokens).double()"),
        (METHODS + "distillm.py", "samples = split_across_dp(drawn, self.layout.dp_size)[self.layout.dp_rank]", "samples = split_across_dp(drawn, self.layout.dp_size)[0]"),
        (METHODS + "distillm.py", "self.buffer.add(self.all_gather_samples(samples))", "self.buffer.add(list(samples))"),
        (METHODS + "distillm.py", "in sorted(samples, key=lambda sample: sample.sample_id)", "in samples"),
        (MODELS + "soft_prompt.py", "self.layout.sum_over_data_parallel(gradient).div_(", "gradient.div_("),
    ],
    story(TP2, "sft and kd"): [
        (KERNELS + "shards.py", 'return {"valid_vocab": self.valid_vocab,', 'return {"valid_vocab": None,'),
        (GENERATION + "sampling.py", "shard.columns(logits_BVp.shape[1]) :", "shard.valid_vocab :"),
        (GENERATION + "sampling.py", "winner = pairs[:, 0].argmax(0)", "winner = pairs[:, 0].argmin(0)"),
        (GENERATION + "generate.py", "VocabShard(model.real_vocab_size, tp", "VocabShard(model.real_vocab_size, 0, tp"),
    ],
    story(TP2, "the others"): [
        (GENERATION + "sampling.py", "[None]).logsumexp(0)", "[None]).amax(0)"),
        (KERNELS + "heads/fused_linear.py", "                loss.shard.all_reduce(gradient)", "                pass"),
    ],
    story(PP2, "promptkd"): [
        (MODELS + "soft_prompt.py", "self.layout.broadcast_from_first_stage(self.vectors.grad)", "self.vectors.grad"),
        (SCHEDULES, "self.activations, self.gradients = iter(shapes), iter(shapes)", "self.activations, self.gradients = iter(shapes), iter(shapes[::-1])"),
        (RUNTIME + "parallel_layout.py", "return self.broadcast_from_stage(tensor, self.pp_size - 1)", "return self.broadcast_from_stage(tensor, 0)"),
        (MODELS + "gpt_model.py", "positions += 0 if soft_prompt_PH is None else soft_prompt_PH.shape[0]", "positions += 0"),
    ],
    story(SP, "sft and kd"): [
        (MODELS + "layer_specs.py", "param.sequence_parallel = config.sequence_parallel", "param.sequence_parallel = False"),
        (MODELS + "gpt_model.py", "tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True"),
        (MODELS + "gpt_model.py", "return math.ceil(positions / self._sequence_parts), rows", "return positions, rows"),
    ],
    of("test_methods", "bfloat16_weights_train_as_float64_does[1-1-1-sft]"): [
        (OPTIMIZER, "grad_reduce_in_fp32=True", "grad_reduce_in_fp32=False"),
    ],
    "tests/kernel_tests/test_kd_loss.py": [
        (KERNELS + "kd/loss.py", "scale_N * self.label_coef, [dz_NV]", "scale_N, [dz_NV]"),
        (KERNELS + "kd/loss.py", "state[2:], scale_N * self.distance_coef", "state[2:], scale_N"),
        (KERNELS + "kd/loss.py", "self.distance.at_once(logits_NV, scale_N * self.distance_coef, grads_NV)", "self.distance.at_once(logits_NV, scale_N, grads_NV)"),
        (KERNELS + "kd/loss.py", "labels=self.labels.of_rows(rows), distance=self.distance.of_rows(rows)", "labels=self.labels.of_rows(rows)"),
        (KERNELS + "kd/loss.py", "self.distance.reads_once and self.distance_coef != 0", "self.distance.reads_once"),
        (KERNELS + "kd/loss.py", "if not self.label_coef or grads_NV[0] is None:", "if grads_NV[0] is None:"),
    ],
    of("test_weight_gradient", "the_word_embeddings_gradient_is_summed_row_by_row"): [
        (MODELS + "word_rows.py", "accumulate=True)", "accumulate=False)"),
        (MODELS + "word_rows.py", ".where(here_BS[..., None], 0.0)", ""),
        (MODELS + "word_rows.py", "(tokens_BS - embedding.vocab_start_index)", "tokens_BS"),
        (MODELS + "word_rows.py", "grad_BSE.flatten(0, 1).to(sums_VE.dtype)", "grad_BSE.flatten(0, 1).bfloat16().to(sums_VE.dtype)"),
        (MODELS + "gpt_model.py", "self.words_summed_by_rows, self.words_awaited = True, awaited", "self.words_summed_by_rows, self.words_awaited = False, awaited"),
    ],
    of("test_methods", "the_heads_gradient_is_never_rounded_to_bfloat16"): [
        (LOSSES + "distillation.py", 'return hasattr(rows.head_VpH, "main_grad")', "return False"),
        (KERNELS + "heads/fused_linear.py", "dW = [torch.zeros_like(W, dtype=accumulation_dtype(W)) if w", "dW = [torch.zeros_like(W) if w"),
    ],
    of("test_methods", "vocabularies_of_unequal_width_are_aligned_by_token_id[97 and 160-1]"): [
        ("megakd/loading.py", '"real_vocab_size": min(vocab_sizes)', '"real_vocab_size": max(vocab_sizes)'),
    ],
    of("test_methods", "the_prompts_learning_rate_never_rises_towards_the_students_lowest"): [
        (OPTIMIZER, "lowest = min(config.min_lr, lr)", "lowest = config.min_lr"),
    ],
    of("test_methods", "distillm_takes_its_batches_where_the_paper_does"): [
        (METHODS + "distillm.py", "STEP, TOLERANCE = 0.1, 0.1", "STEP, TOLERANCE = 0.1, 0.0"),
        (METHODS + "distillm.py", "STEP, TOLERANCE = 0.1, 0.1", "STEP, TOLERANCE = 0.2, 0.1"),
        (METHODS + "distillm.py", '"last_loss": self.last_loss, **self.buffer.tensors', '"last_loss": self.last_loss'),
        (METHODS + "distillm.py", "or (u < threshold and not self.buffer.is_full)", "or False"),
    ],
    of("test_methods", "a_response_of_the_teacher_is_written_once_for_all_replicas"): [
        (METHODS + "seqkd.py", "if sample.sample_id not in self.written", "if sample"),
        (METHODS + "seqkd.py", "in self.all_gather_samples(answers)}", "in answers}"),
    ],
    of("test_methods", "positions_and_tokens_of_the_global_batch_are_counted"): [
        (METHODS + "base.py", 'return {"positions": real,', 'return {"positions": computed,'),
        (METHODS + "base.py", '"real_share": real / computed}', '"real_share": computed / computed}'),
        (METHODS + "base.py", "_, real, computed = self.layout.sum_over_data_parallel(counts).double()", "_, real, computed = counts.double()"),
    ],
    of("test_methods", "a_random_prompt_is_the_seeds"): [
        (METHODS + "promptkd.py", "settings.prompt_len, training.seed)", "settings.prompt_len, 0)"),
        (MODELS + "soft_prompt.py", "noise * sample.float().std()", "noise"),
    ],
    of("test_methods", "a_rollout_is_drawn_as_the_flags_say"): [
        (METHODS + "rollout.py", "top_k=settings.top_k", "top_k=0"),
        (METHODS + "rollout.py", "top_p=settings.top_p", "top_p=1.0"),
        (METHODS + "rollout.py", "batch_size=settings.rollout_batch_size", "batch_size=None"),
    ],
    of("test_methods", "minillms_text_comes_in_an_order_of_its_own"): [
        (METHODS + "minillm.py", "config.training.seed + 1", "config.training.seed"),
        (METHODS + "minillm.py", "settings.lm_data or data.train_data", "data.train_data"),
        (METHODS + "minillm.py", '"full_rows": True', '"full_rows": False'),
    ],
    of("test_dropout", "the_student_learns_with_dropout_and_is_read_without"): [
        (SCHEDULES, "    with torch.no_grad(), evaluation_mode(model):\n        return run_schedule", "    with torch.no_grad():\n        return run_schedule"),
        (SCHEDULES, "    with torch.no_grad(), evaluation_mode(model):\n        sums = _run_loss", "    with torch.no_grad():\n        sums = _run_loss"),
        (SCHEDULES, "model.train(was_training)", "model.train(False)"),
        (METHODS + "base.py", "self.student.train()", "self.student.eval()"),
        (MODELS + "attention.py", "dropout = self.dropout if self.training else 0.0", "dropout = self.dropout"),
    ],
    of("test_dropout", "tensor_parallel_ranks_agree_outside_parallel_regions_all_else_differs"): [
        (RUNTIME + "initialize.py", "place = layout.pp_rank * layout.dp_size + layout.dp_rank", "place = layout.pp_rank * layout.dp_size + layout.dp_rank + 97 * layout.tp_rank"),
        (RUNTIME + "initialize.py", "place = layout.pp_rank * layout.dp_size + layout.dp_rank", "place = layout.dp_rank"),
        (RUNTIME + "initialize.py", "place = layout.pp_rank * layout.dp_size + layout.dp_rank", "place = layout.pp_rank"),
        (RUNTIME + "initialize.py", 'f"{seed}/{iteration}/{place}"', 'f"{seed + iteration}/{place}"'),
        (RUNTIME + "initialize.py", "model_parallel_cuda_manual_seed(mixed, tp_rank=layout.tp_rank,", "model_parallel_cuda_manual_seed(mixed, tp_rank=0,"),
        (RUNTIME + "initialize.py", "model_parallel_cuda_manual_seed(mixed, tp_rank=layout.tp_rank,", "model_parallel_cuda_manual_seed(seed, tp_rank=layout.tp_rank,"),
    ],
    of("test_dropout", "masks_differ_from_iteration_to_iteration_and_from_seed_to_seed"): [
        (RUNTIME + "initialize.py", 'f"{seed}/{iteration}/{place}"', 'f"{iteration}/{place}"'),
        (TRAINER, "self.layout, iteration=self.iteration)", "self.layout)"),
        (TRAINER, "seed_everything(self.config.training.seed, self.layout, iter", "seed_everything(1234, self.layout, iter"),
    ],
    of("test_dropout", "minillm_learns_without_dropout_whatever_the_folder_says"): [
        (METHODS + "minillm.py", "has_dropout = False", "has_dropout = True"),
        (TRAINER, "if not METHODS[config.method].has_dropout:", "if True:"),
    ],
    "tests/gpu_simulation/test_planning.py::test_micro_batches_are_counted_within_both_limits": [
        ("megakd/planning/plan.py", "    if tokens:\n", "    if False:\n"),
    ],
    "tests/gpu_simulation/test_planning.py::test_layouts_whose_weights_and_moments_alone_are_too_large_are_left_out": [
        ("megakd/planning/layouts.py", "if layout.pp <= most]", "if True]"),
        ("megakd/planning/layouts.py", "if config.parallel.use_distributed_optimizer else 1)", "if False else 1)"),
    ],
    "tests/test_runtime.py": [
        (RUNTIME + "initialize.py", "torch.backends.cuda.enable_cudnn_sdp(False)", "torch.backends.cuda.enable_cudnn_sdp(True)"),
        (RUNTIME + "quiet.py", "if not ALLOCATOR & os.environ.keys():", "if True:"),
        (RUNTIME + "megatron_repairs.py", "if not USING_PYTORCH_OPTIMIZER:", "if False:"),
        (MODELS + "model_provider.py", '"batch_p2p_comm": layout.device.type == "cuda"', '"batch_p2p_comm": False'),
    ],
    of("test_overlap", "gradients_that_travel_early_teach_the_same"): [
        (OPTIMIZER, "model.sum_words_by_rows(awaited=overlap)", "model.sum_words_by_rows(awaited=False)"),
        (METHODS + "__init__.py", '"overlap": config.parallel.overlap_grad_reduce', '"overlap": False'),
        (SCHEDULES, "nullcontext() if forward_only or done == len(batches) else without_reduction(model)", "nullcontext()"),
    ],
    "tests/test_weight_gradient.py": [
        (TRAINER, '"gradient_accumulation_fusion": config.training.gradient_accumulation_fusion', '"gradient_accumulation_fusion": False'),
        (RUNTIME + "weight_gradient.py", "if layers._grad_accum_fusion_available:", "if False:"),
        ("megakd/config/train.py", "if training.gradient_accumulation_fusion and self.lora.rank:", "if False:"),
    ],
    of("test_overlap", "what_several_buckets_of_a_shared_optimizer_saved_goes_on_as_the_unbroken_run"): [
        (RUNTIME + "megatron_repairs.py", "[(bucket, bucket.grad_data.numel()) for", "[(bucket, bucket.numel_unpadded) for"),
    ],
    of("test_checkpointing", "a_tied_embedding_on_two_stages_is_saved_with_its_own_share_of_the_optimizer"): [
        (RUNTIME + "megatron_repairs.py", "        part.numel_unpadded = numel\n    try:", "        pass\n    try:"),
    ],
    of("test_generation", "a_rollouts_cache_is_given_back_where_that_is_asked_for"): [
        (METHODS + "rollout.py", "        Rooms.of(student).release()", "        pass"),
        (METHODS + "rollout.py", "if settings.release_decode_cache:", "if True:"),
    ],
    of("test_vllm_rollouts", "weights_and_responses_are_the_same_on_every_layout"): [
        (CHECKPOINTS + "live_tensors.py", "layout.broadcast_from_stage(shard, stage)", "layout.broadcast_from_stage(shard, 0)"),
        (CHECKPOINTS + "live_tensors.py", "enumerate(shards)", "enumerate(shards[::-1])"),
        (CHECKPOINTS + "live_tensors.py", "zip(ranges, part.split(", "zip(ranges[::-1], part.split("),
        (CHECKPOINTS + "live_tensors.py", "sorted(parts)", "sorted(parts, reverse=True)"),
        (CHECKPOINTS + "live_tensors.py", "if tensor.skip_rows:", "if False:"),
        (CHECKPOINTS + "live_tensors.py", "if tensor.transposed and joined.ndim == 2", "if False"),
        (GENERATION + "vllm_engine.py", "range(layout.pp_rank, len(prompts), layout.pp_size)", "range(0, len(prompts), layout.pp_size)"),
        (GENERATION + "vllm_engine.py", "dict(zip(mine, found)) if layout.tp_rank == 0 else {}, layout.groups.mp", "dict(zip(mine, found)), layout.groups.tp"),
        (GENERATION + "vllm_engine.py", "tensor_parallel_size=model.layout.tp_size", "tensor_parallel_size=1"),
        (GENERATION + "vllm_engine.py", 'self.llm.wake_up(tags=["weights"])', "pass"),
        (GENERATION + "vllm_engine.py", 'self.llm.wake_up(tags=["kv_cache"])', "pass"),
        (GENERATION + "vllm_engine.py", "max_num_seqs=config.generation.rollout_batch_size", "max_num_seqs=None"),
    ],
    of("test_vllm_rollouts", "a_layers_tensors_come_together"): [
        (CHECKPOINTS + "live_tensors.py", "-1 if parameter.layer is None else parameter.layer)", "0)"),
    ],
    of("test_vllm_rollouts", "greedy_responses_are_those_of_our_decoder_and_draws_are_each_rows_own"): [
        (GENERATION + "vllm_engine.py", "0.0 if sampling.greedy else sampling.temperature", "sampling.temperature"),
        (GENERATION + "vllm_engine.py", '"stop_token_ids": sorted(ends)', '"stop_token_ids": sorted(ends)[:1]'),
        (GENERATION + "vllm_engine.py", '"max_tokens": sampling.max_new_tokens,', ""),
    ],
    of("test_vllm_rollouts", "draws_follow_temperature_top_k_and_top_p_and_lengths_are_bounded"): [
        (GENERATION + "vllm_engine.py", "else sampling.temperature,", "else 1.0,"),
        (GENERATION + "vllm_engine.py", '"top_k": sampling.top_k', '"top_k": 0'),
        (GENERATION + "vllm_engine.py", '"top_p": sampling.top_p', '"top_p": 1.0'),
        (GENERATION + "vllm_engine.py", "noise_streams(sampling.seed, sample_ids,", "noise_streams(0, sample_ids,"),
        (GENERATION + "vllm_engine.py", 'torch.device("cpu"), generations)', 'torch.device("cpu"))'),
        (GENERATION + "vllm_engine.py", '"ignore_eos": True', '"ignore_eos": False'),
        (GENERATION + "vllm_engine.py", "max_model_len=config.data.max_length", "max_model_len=None"),
    ],
    of("test_vllm_rollouts", "ids_that_do_not_count_are_never_drawn_and_what_does_not_go_is_told"): [
        (CHECKPOINTS + "live_tensors.py", "piece[: model.real_vocab_size] if isinstance(parameter.mapping, Vocabulary) else piece", "piece"),
        (GENERATION + "vllm_engine.py", '"vocab_size": model.real_vocab_size', '"vocab_size": model.hf_config.vocab_size'),
        (GENERATION + "vllm_engine.py", "if not all(map(math.isfinite, response.log_probs)):", "if False:"),
        (GENERATION + "vllm_engine.py", "gpu_memory_utilization=share", "gpu_memory_utilization=0.3"),
    ],
    of("test_vllm_rollouts", "log_probabilities_agree_unless_a_weight_is_wrong"): [
        (METHODS + "agreement.py", "layout.sum_over_data_parallel(torch.stack([found.sum(), found.new_tensor(len(found))]))", "torch.stack([found.sum(), found.new_tensor(len(found))])"),
        (METHODS + "agreement.py", "    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.dp_group)\n", ""),
        (METHODS + "agreement.py", "layout.broadcast_from_last_stage(torch.stack([*total, largest]))", "torch.stack([*total, largest])"),
        (METHODS + "agreement.py", "for number in batch.sample_ids.tolist() for x", "for number in range(len(batch.sample_ids)) for x"),
        (METHODS + "agreement.py", ".double()).abs())", ".double()))"),
        (GENERATION + "vllm_engine.py", "        self.llm.reset_prefix_cache()\n", ""),
        (GENERATION + "vllm_engine.py", 'logprobs_mode="raw_logprobs"', 'logprobs_mode="processed_logprobs"'),
    ],
    of("test_vllm_rollouts", "adapters_are_handed_over_in_the_weights"): [
        (MODELS + "lora.py", "total + delta if adapter.rows is None else total.index_add(0, adapter.rows, delta)", "total + delta if adapter.rows is None else total"),
        (MODELS + "model_provider.py", 'if name.startswith(METHOD_PARTS) or ".adapters." in name:', "if name.startswith(METHOD_PARTS):"),
    ],
    of("test_vllm_rollouts", "a_run_is_the_one_with_our_decoder_where_one_token_is_left_to_choose"): [
        (GENERATION + "vllm_engine.py", '        self.llm.collective_rpc("reload', '        setattr(self, "given", True) if hasattr(self, "given") else setattr(self, "given", True) or self.llm.collective_rpc("reload'),
        (GENERATION + "vllm_engine.py", "with torch.random.fork_rng(devices=[device] if device.type == \"cuda\" else []):", "if True:"),
        (CHECKPOINTS + "live_tensors.py", "merged_weight(linear) if linear else param.detach()", "param.detach()"),
        (MODELS + "lora.py", "delta = adapter.scale * (adapter.B.float()", "delta = (adapter.B.float()"),
        (TRAINER, "(self.engine.take_differences() if self.engine else {})", "{}"),
        (TRAINER, "if config.writes_with_vllm else None", "if False else None"),
    ],
    "tests/test_bad_inputs.py::test_a_mistake_ends_in_one_clear_line": [
        ("megakd/config/sampling.py", 'if self.rollout_engine != "vllm":', "if True:"),
        ("megakd/config/sampling.py", "if not COLDEST_OF_VLLM <= self.temperature <= HOTTEST_OF_VLLM:", "if not self.temperature <= HOTTEST_OF_VLLM:"),
        ("megakd/config/sampling.py", "        if config.training.deterministic_mode:", "        if False:"),
        ("megakd/config/sampling.py", "if ranks := config.teacher_parallel.teacher_ranks:", "if ranks := 0:"),
        ("megakd/config/methods/minillm.py", 'if self.teacher_mixed_alpha and config.generation.rollout_engine == "vllm":', "if False:"),
    ],
    of("test_vllm_rollouts", "a_folder_of_quantised_weights_is_refused", "vllm_that_is_absent_or_old_is_refused_in_one_line"): [
        ("megakd/preflight.py", "    if not config.writes_with_vllm:\n        return\n", ""),
        ("megakd/preflight.py", "if quantization(student.config):", "if False:"),
        (GENERATION + "vllm_engine.py", '[:2])) < LEAST:', '[:2])) < (0, 9):'),
        (GENERATION + "vllm_engine.py", 'if importlib.util.find_spec("vllm") is None:', "if False:"),
    ],
    of("test_generation", "tensor_parallel_ranks_agree_on_a_token"): [
        (GENERATION + "sampling.py", "if self.sampling.top_p < 1 and self.shard.ranks > 1:", "if False:"),
    ],
    "tests/kernel_tests/test_gumbel.py": [
        (GENERATION + "sampling.py", "not (self.sampling.greedy or self.sampling.needs_whole_rows)", "not self.sampling.greedy"),
        (GENERATION + "sampling.py", '"columns": shard.columns(width)', '"columns": width'),
        (KERNELS + "gumbel/triton.py", "tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))", "tl.log(y)"),
    ],
    of("test_dropout", "recomputing_activations_changes_no_number[sft-flags0]"): [
        (TRAINER, "if not config.training.recompute:", "if True:"),
    ],
    of("test_reference_behaviour", "warm_up_begins_above_zero_and_the_reference_at_zero"): [
        (OPTIMIZER, "iteration -= config.reference_compat.zero_lr_start", "iteration -= 1"),
    ],
    of("test_reference_behaviour", "the_mean_over_tokens_is_no_mean_of_means"): [
        (SCHEDULES, "scaled(tokens / (count * max(1, batch.num_supervised)))", "scaled(1.0)"),
    ],
    of("test_reference_behaviour", "the_last_step_is_lost_only_where_gradients_accumulate"): [
        (TRAINER, "training.micro_batch_size * dp_size", "training.micro_batch_size"),
    ],
    of("test_reference_behaviour", "the_teacher_has_no_dropout_while_the_prompt_learns"): [
        (TRAINER, "with_dropout = config.training.reference_compat.teacher_dropout", "with_dropout = True"),
        (METHODS + "promptkd.py", "        self.teacher.eval()\n", ""),
    ],
    of("test_reference_behaviour", "norms_are_kept_from_decay_and_the_reference_decays_those_it_does_not_name"): [
        (OPTIMIZER, "return get_standard_config_overrides(settings)", "return {}"),
    ],
    of("test_trainer", "rollouts_recompute_a_step"): [
        (TRAINER, "mask = [0] * (len(sample.prompt) - 1)", "mask = [0] * len(sample.prompt)"),
    ],
    of("test_trainer", "a_run_cut_off_and_continued_logs_the_same_numbers[promptkd]"): [
        ("megakd/teachers/live.py", "            tensor.copy_(tensors[name])", "            pass"),
        (CHECKPOINTS + "training.py", '        optimizer.load_state_dict(loaded["optimizer"])', "        pass"),
        (CHECKPOINTS + "training.py", '    model.load_state_dict(loaded["model"], strict=not model.adapted)', "    pass"),
        (OPTIMIZER, 'return {"vectors": vectors.detach(), **state}', 'return {"vectors": vectors.detach()}'),
    ],
    of("test_trainer", "evaluations_and_saves_are_due_when_the_flags_say", "an_evaluation_is_as_long_as_the_flag_says"): [
        (TRAINER, "return self.iteration == self.total_iters or bool", "return bool"),
        (TRAINER, "bool(interval and self.iteration % interval == 0)", "bool(interval)"),
        (TRAINER, "iters * config.training.global_batch_size) if iters", "iters) if iters"),
        (TRAINER, "Sampling(max_new_tokens=self.config.max_new_tokens, greedy=True)", "Sampling(max_new_tokens=self.config.max_new_tokens)"),
    ],
    of("test_runtime", "ranks_share_the_cores_they_may_use_unless_told_otherwise"): [
        (RUNTIME + "initialize.py", "usable_cores() // local_ranks", "usable_cores()"),
        (RUNTIME + "initialize.py", "return len(os.sched_getaffinity(0)) if", "return os.cpu_count() if"),
    ],
    of("test_runtime", "a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees"): [
        (RUNTIME + "initialize.py", "return local_rank % visible", "return 0"),
    ],
    of("test_checkpointing", "")[: -len("::test_")]: [
        (RUNTIME + "megatron_repairs.py", 'state["step"] = state["step"].clone()', "pass"),
        (CHECKPOINTS + "training.py", "weights[HEAD].allow_shape_mismatch = True", "pass"),
    ],
    of("test_models", "logits_equal_transformers[2-2-1-False]"): [
        (MODELS + "opt.py", '"layernorm_epsilon": 1e-5', '"layernorm_epsilon": 1e-3'),
        (MODELS + "param_mapping.py", "return [(tp_rank * step, (tp_rank + 1) * step)]", "return [(0, step)]"),
        (MODELS + "model_provider.py", "layer + offset)", "layer)"),
    ],
    of("test_models", "scaled_ropes_equal_transformers_beyond_the_original_context"): [
        (MODELS + "rope.py", 'getattr(rotary, f"{start}attention_scaling")', "1.0"),
        (MODELS + "rope.py", 'getattr(rotary, f"{start}inv_freq").detach()', 'getattr(rotary, f"{start}inv_freq").square().detach()'),
    ],
    "tests/test_data_loader.py": [
        (DATA + "dataloader.py", "np.random.default_rng((self.seed, epoch))", "np.random.default_rng(self.seed)"),
        (DATA + "dataloader.py", "np.random.default_rng((self.seed, epoch))", "np.random.default_rng((1234, epoch))"),
        (DATA + "dataloader.py", "first = batch * self.rows_per_batch", "first = 0"),
        (DATA + "dataloader.py", "self.dp_size)[self.dp_rank]", "self.dp_size)[0]"),
        (DATA + "dataloader.py", "[*range(ranks), *reversed(range(ranks))]", "[*range(ranks), *range(ranks)]"),
    ],
    of("test_methods", "a_teacher_that_reads_another_text_teaches_the_same_tokens[1-1-1-False]"): [
        (TEACHERS + "live.py", "supervised_hidden(self.model, self.text(batches), soft_prompt)", "supervised_hidden(self.model, batches, soft_prompt)"),
        (TEACHERS + "live.py", "return list(batches)", "return [batch.for_teacher for batch in batches]"),
        (METHODS + "seqkd.py", "[sample.for_teacher for sample in samples]", "samples"),
        (OPTIMIZER, "sgd_momentum=config.momentum,", "sgd_momentum=0.0,"),
        (OPTIMIZER, 'optimizer="sgd" if config.optimizer == "sgd" else "adam",', 'optimizer="adam",'),
        (METHODS + "response_priming.py", "alpha=settings.priming_alpha", "alpha=0.6093348343631224"),
        (METHODS + "response_priming.py", "collate_unshifted if self.is_unshifted(config) else collate", "collate"),
        (GENERATION + "rows.py", "written = [decoder.width + self.read for decoder", "written = [self.decoders[0].width + self.read for decoder"),
        (GENERATION + "rows.py", "zip(*(row.prompts for row in reading))", "zip(*([row.prompt] * len(row.prompts) for row in reading))"),
        (GENERATION + "decoder.py", "max(lengths[lo:hi])", "lengths[lo]"),
        (METHODS + "minillm.py", "prompts = [sample.for_teacher.prompt for sample in samples]", "prompts = [sample.prompt for sample in samples]"),
        (METHODS + "distillm.py", "teacher_prompt=known.teacher_prompt", "teacher_prompt=None"),
        ("megakd/teachers/live.py", "self.attached.step(self.text(batches), rows", "self.attached.step(batches, rows"),
    ],
    of("test_hidden_matching", "hidden_states_of_a_teacher_that_reads_another_text_are_those_of_the_same_tokens[1-1]"): [
        (TEACHERS + "live.py", "batches, found = self.text(batches), {", "batches, found = batches, {"),
    ],
    "tests/test_priming.py": [
        (DATA + "priming.py", "text if text[-1].isspace() else", "text if True else"),
        (DATA + "priming.py", 'f"{field}\\n\\n" if field else ""', 'f"{field} " if field else ""'),
        (DATA + "priming.py", '("", " Briefly', '(" Briefly", " '),
        (DATA + "conditioning.py", 'if turn["role"] == "user"), default=None)', 'if turn["role"] != "assistant"), default=None)'),
        (DATA + "conditioning.py", "last = max((i", "last = min((i"),
        (DATA + "conditioning.py", "teacher if own_template else student", "student"),
        (DATA + "conditioning.py", "own_template in (None, ", "own_template in (own_template, "),
        (DATA + "conditioning.py", "max(len(response), self.new_tokens)", "len(response)"),
        (DATA + "conditioning.py", "len(prompt) > self.settings.teacher_max_prompt_length", "len(prompt) >= 10 * self.settings.teacher_max_prompt_length"),
        (DATA + "conditioning.py", "if len(prompt) > room:", "if len(prompt) > room + 1:"),
        (DATA + "text_dataset.py", "else [] if ids == prompts[i] else ids", "else ids"),
        (DATA + "sft_dataset.py", "tokenizer)\n            for i, response, ids in zip(kept, learnt, primed)", "tokenizer)\n            for i, response, ids in zip(kept, learnt, [[]] * len(primed))"),
        (DATA + "shown.py", "sample.for_teacher, tokenizer, written)", "sample, tokenizer, written)"),
        (CONFIG + "conditioning.py", '.replace("_", "-").lower()', ""),
    ],
    "tests/test_response_priming.py": [
        (LOSSES + "distillation.py", 'Divergence("reverse_kl", temperature)', 'Divergence("forward_kl", temperature)'),
        (LOSSES + "distillation.py", "distance_coef=(1 - alpha) * temperature**2", "distance_coef=(1 - alpha) * temperature"),
        (METHODS + "response_priming.py", "return cls.is_unshifted(config)", "return False"),
        ("megakd/run_data.py", "as_read_unshifted if METHODS[config.method].is_unshifted(config) else as_read", "as_read"),
    ],
    of("test_self_distillation", "a_teacher_that_averages_the_student_equals_float64_transformers[2-1-1-False]", "an_average_of_16_bit_weights_is_kept_in_float32"): [
        (TEACHERS + "moving_average.py", "1 - self.decay)", "self.decay)"),
        (TEACHERS + "moving_average.py", "weight.detach().float()", "weight.detach()"),
        (TEACHERS + "moving_average.py", "            weight.copy_(self.average[name])", "            pass"),
        (METHODS + "base.py", "self.teacher.after_step(self.student)", "pass"),
    ],
    of("test_self_distillation", "a_run_cut_off_and_continued_logs_the_same_numbers"): [
        (TRAINER, "teacher=teacher_weights(method.teacher),", "teacher=None,"),
        (OPTIMIZER, "part.init_state_fn or _begin_momentum", "part.init_state_fn or (lambda *_: None)"),
    ],
    of("test_self_distillation", "an_average_goes_on_at_another_layout_and_is_resharded", "an_empty_priming_is_none_to_the_bit"): [
        (TEACHERS + "build.py", "if decay is not None:", "if False:"),
        ("megakd/run_data.py", "routed(open_training_rows(config, tokenizer, conditioning), config)", "routed(open_training_rows(config, tokenizer, None), config)"),
    ],
    of("test_self_distillation", "show_data_prints_rows_as_they_are_read_and_leaves_nothing"): [
        (TRAINER, "if not config.output.show_data:", "if True:"),
        (TRAINER, "config.output.show_data or int(config.conditioning.adds_text)", "config.output.show_data"),
    ],
    "tests/test_primed_evaluation.py": [
        (EVALUATION + "evaluator.py", "open_sets(config, tokenizer, folders.conditioning(config.conditioning, **options))", "open_sets(config, tokenizer, None)"),
        (EVALUATION + "evaluator.py", 'data.teacher_questions() if writer == "teacher" else data.questions()', "data.questions()"),
        (EVALUATION + "exposure_bias.py", "replace(sample, sample_id=i)", "Sample(i, sample.prompt, sample.response)"),
        ("megakd/loading.py", "model if path == SELF else path", "path"),
    ],
    of("test_packing", "every_method_learns_packed_what_it_learns_padded[one rank]"): [
        (METHODS + "base.py", '"pack": training.pack', '"pack": False'),
        (MODELS + "packed_rows.py", "columns = [prompted + length for length in lengths]", "columns = list(lengths)"),
    ],
    of("test_packing", "every_method_learns_packed_what_it_learns_padded[PP2]"): [
        (MODELS + "gpt_model.py", " * len(packed_lengths or (0,))", ""),
        (SCHEDULES, "inner.p2p_shape(batch.tokens, soft_prompt, batch.packed_lengths)", "inner.p2p_shape(batch.tokens, soft_prompt)"),
    ],
    of("test_packing", "every_family_says_the_same_packed_and_its_gradient_is_the_same[]"): [
        (MODELS + "packed_rows.py", "return [(size, len(list(same))) for size, same in groupby(self.lengths)]", "return [(sum(self.lengths), 1)]"),
        (MODELS + "gpt_model.py", "tables[:, :, packed.position_ids] if packed else tables", "tables[:, :, : received.shape[0]]"),
        (MODELS + "transformer_layer.py", "packed_seq_params=packed_seq_params\n        )", "packed_seq_params=None\n        )"),
        (DATA + "batch.py", "torch.cat([torch.arange(length) for length in lengths.tolist()])", "torch.arange(tokens.shape[1])"),
    ],
    of("test_packing", "every_family_says_the_same_packed_and_its_gradient_is_the_same[behind a soft prompt]"): [
        (MODELS + "packed_rows.py", "row[self.prompted :] for row", "row[: len(row) - self.prompted] for row"),
        (MODELS + "gpt_model.py", "packed.position_ids[: x.shape[1]] if packed else", "torch.zeros_like(packed.position_ids[: x.shape[1]]) if packed else"),
    ],
    of("test_packing", "sequence_parallelism_fills_up_what_does_not_divide"): [
        (MODELS + "packed_rows.py", "if missing := -sum(columns) % multiple:", "if missing := 0:"),
    ],
    of("test_flash", "the_first_package_that_takes_a_call_attends"): [
        (MODELS + "flash.py", "query.shape[-1] in package.heads.get(major, ()) and ", ""),
        (MODELS + "flash.py", " and (package.knows_dropout or not dropout)\n        if takes", "\n        if takes"),
        (MODELS + "flash.py", "10: range(8, 129, 8)", "10: range(8, 257, 8)"),
        (MODELS + "flash.py", "if not query.is_cuda or query.dtype not in", "if query.dtype not in"),
    ],
    of("test_flash", "each_package_is_called_in_its_own_shapes"): [
        (MODELS + "flash.py", "else (window - 1, 0)", "else (window, 0)"),
        (MODELS + "flash.py", "no_window=(None, None)", "no_window=(-1, 0)"),
    ],
    of("test_packing", "flash_attn_is_told_where_rows_begin"): [
        (MODELS + "packed_rows.py", "max_seqlen_q=max(columns)", "max_seqlen_q=sum(columns)"),
        (MODELS + "packed_rows.py", "starts = torch.tensor([0, *accumulate(columns)]", "starts = torch.tensor([0, sum(columns)]"),
    ],
    of("test_packing", "a_packed_batch_has_the_same_labels_in_the_same_order_and_no_padding"): [
        (DATA + "batch.py", "teacher_batch = batch.teacher_batch and packed(batch.teacher_batch)", "teacher_batch = batch.teacher_batch"),
    ],
    of("test_packing", "packed_micro_batches_are_few_and_within_both_limits"): [
        (DATA + "batch.py", "len(group) < most and sample.longest <= room[i]", "sample.longest <= room[i]"),
        (DATA + "batch.py", "room[i] -= sample.longest", "pass"),
    ],
    of("test_packing", "a_dry_run_counts_packed_positions"): [
        ("megakd/dry_run.py", "sum(sorted(lengths)[-most:]) if pack", "sum(sorted(lengths)[:most]) if pack"),
        ("megakd/dry_run.py", "min(tokens, max(most_tokens, longest))", "min(tokens, most_tokens)"),
    ],
    of("test_packing", "a_dry_run_counts_the_micro_batches_that_positions_ask_for"): [
        ("megakd/dry_run.py", "math.ceil(positions / max(most_tokens, longest[-1])) if most_tokens else 1", "1"),
    ],
    of("test_packing", "attention_that_slides_takes_some_queries_at_a_time"): [
        (MODELS + "attention.py", "max(0, first - window + 1), first + query.shape[2]", "max(0, first - window + 2), first + query.shape[2]"),
    ],
    of("test_packing", "nothing_grows_with_the_square_of_a_row_or_with_row_times_vocabulary"): [
        (MODELS + "attention.py", "QUERIES_AT_ONCE = 512", "QUERIES_AT_ONCE = 2**20"),
    ],
    of("test_packing", "held_out_rows_are_packed_too"): [
        (TRAINER, "pack=training.pack", "pack=False"),
    ],
    "tests/test_data_batch.py": [
        (DATA + "batch.py", "position_ids >= ends - counted", "position_ids >= ends - counted + 1"),
        (DATA + "batch.py", "return len(self.response) - (not self.prompt)", "return len(self.response)"),
        (DATA + "batch.py", "teacher_batch=self.teacher_batch and self.teacher_batch.to(device)", "teacher_batch=None"),
        (DATA + "batch.py", "sorted(samples, key=lambda sample: -sample.longest)", "sorted(samples, key=lambda sample: -sample.num_positions)"),
        (DATA + "batch.py", "most_tokens is None or size <= most_tokens", "most_tokens is None or size <= 2 * most_tokens"),
        (DATA + "batch.py", "MICRO_BATCH_COST, GPU_MICRO_BATCH_COST = 128", "MICRO_BATCH_COST, GPU_MICRO_BATCH_COST = 0"),
    ],
    "tests/test_data_forms.py|tests/test_data_minillm.py|tests/test_data_errors.py": [
        (DATA + "sft_dataset.py", "responses[i][: max_length - len(prompts[i])] if", "responses[i][:max_length] if"),
        (DATA + "sft_dataset.py", "if len(prompt) <= max_prompt_length]", "]"),
        (DATA + "sft_dataset.py", "whole = len(self._stream) // self.max_length * self.max_length", "whole = len(self._stream)"),
    ],
    of("test_dry_run", "sizes_by_formula_are_those_of_the_model"): [
        (MODELS + "sizes.py", "(1 if table[name].axis is None else tp)", "tp"),
        (MODELS + "sizes.py", "if hf.tie_word_embeddings and stage == pp - 1:", "if hf.tie_word_embeddings and stage == pp:"),
    ],
    of("test_dry_run", "memory_by_formula_is_within_10_percent_of_a_run_on_a_cpu"): [
        ("megakd/memory.py", "gradients=FLOAT * trained,", "gradients=2 * FLOAT * trained,"),
        ("megakd/memory.py", "in_flight = min(grid.pp_size - stage, load.micro_batches)", "in_flight = grid.pp_size + 2"),
    ],
    of("test_verify", "a_fault_in_one_layout_is_seen"): [
        ("megakd/verify.py", "fits = difference <= tolerance * max(largest, 1e-6)", "fits = True"),
    ],
    of("test_verify", "a_layout_says_what_one_rank_says"): [
        ("megakd/verify.py", "layout.dp_size)[layout.dp_rank]", "layout.dp_size)[0]"),
        ("megakd/verify.py", "dist.all_gather(shards, part.contiguous(), group=layout.tp_group)", "shards[0].copy_(part)"),
    ],
    of("test_dry_run", "a_disk_without_room_is_told_before_a_run"): [
        ("megakd/preflight.py", "    if free < needed:", "    if False:"),
    ],
    of("test_input_limits", "a_hostile_model_is_refused_soon"): [
        ("megakd/model_files.py", "real.is_relative_to(home) or", "True or"),
        ("megakd/model_files.py", "most=MOST_SMALL", "most=2**40"),
        (MODELS + "safetensors_file.py", "if MOST_HEADER < length <= size:", "if False:"),
        (MODELS + "pytorch_file.py", "part.compress_type != zipfile.ZIP_STORED or", "False or"),
    ],
    of("test_input_limits", "a_hostile_chat_template_is_ended", "a_hostile_prompt_template_is_ended"): [
        (DATA + "bounded.py", "signal.setitimer(signal.ITIMER_REAL, seconds)", "signal.setitimer(signal.ITIMER_REAL, 100 * seconds)"),
        (DATA + "bounded.py", "if len(text) > MOST_TEXT:", "if False:"),
    ],
    of("test_input_limits", "hostile_settings_are_refused_soon"): [
        (CONFIG + "yaml_file.py", "if self.levels > MOST_LEVELS:", "if False:"),
        (CONFIG + "base.py", "unusable_paths(self), ", ""),
    ],
    of("test_input_limits", "the_hubs_own_cache_is_read"): [
        ("megakd/model_files.py", 'real.match("models--*/blobs/*")', "False"),
    ],
    of("test_generation", "noise_is_uniform_over_tokens_rows_positions_and_seeds"): [
        (GENERATION + "sampling.py", "mix64(mix64(torch.full_like(ids_B, seed)) + ids_B * GOLDEN_GAMMA)", "mix64(ids_B * GOLDEN_GAMMA)"),
        (GENERATION + "sampling.py", "mix64(mix64(torch.full_like(ids_B, seed)) + ids_B * GOLDEN_GAMMA)", "mix64(torch.full_like(ids_B, seed))"),
        (GENERATION + "sampling.py", "mix64(streams_B + (positions_B + 1) * GOLDEN_GAMMA)", "mix64(streams_B + GOLDEN_GAMMA + 0 * positions_B)"),
    ],
    of("test_generation", "samples_follow_the_softmax_with_temperature_top_k_and_top_p", "mixed_samples_follow_the_mixture"): [
        (GENERATION + "sampling.py", "z = keep_top_k(z, self.sampling.top_k)", "z = keep_top_k(z, self.sampling.top_k + 1)"),
        (GENERATION + "sampling.py", "z = keep_top_p(z, self.sampling.top_p)", "pass"),
        (GENERATION + "sampling.py", ".add_(math.log(share))", ".add_(0.0)"),
        (GENERATION + "sampling.py", "else z / self.sampling.temperature", "else z * self.sampling.temperature"),
    ],
    of("test_quantised_teacher", "codes_of_a_row_that_ranks_share_are_those_of_the_whole"): [
        (MODELS + "eight_bit.py", "dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)", "pass"),
    ],
    of("test_quantised_teacher", "a_dynamic_teacher_multiplies_codes_at_every_layout_alike"): [
        (MODELS + "linear.py", "(self.sequence_parallel and not is_coded) or args", "self.sequence_parallel or args"),
        (MODELS + "weight_only.py", "module.multiply = eight_bit", "module.unused = eight_bit"),
    ],
    of("test_quantised_teacher", "a_recomputed_layer_multiplies_the_same_numbers_twice"): [
        (MODELS + "linear.py", "self.multiply is not None and not self.training", "self.multiply is not None"),
    ],
    of("test_quantised_teacher", "ranks_that_share_a_layer_multiply_the_codes_of_the_whole"): [
        (MODELS + "eight_bit.py", "self.group if self.cuts_columns else None)", "None)"),
        (MODELS + "eight_bit.py", "if sequence_parallel and not self.cuts_columns:", "if False:"),
        (MODELS + "eight_bit.py", "        dist.all_reduce(out, group=self.group)", "        pass"),
    ],
    of("test_quantised_teacher", "a_dynamic_product_is_that_of_the_codes_of_both"): [
        (MODELS + "eight_bit.py", 'scaled.round() if kind == "int8-dynamic" else scaled', "scaled"),
        (MODELS + "eight_bit.py", "sums * x_scales * w_scales.t()", "sums * x_scales * w_scales.mean()"),
    ],
    of("test_deterministic", "a_run_has_them_and_the_same_numbers_on_a_cpu"): [
        ("megakd/trainer.py", "deterministic_mode(config.training.deterministic_mode), lock", "deterministic_mode(False), lock"),
    ],
    of("test_deterministic", "an_environment_that_promises_nothing_is_refused"): [
        ("megakd/runtime/deterministic.py", "not in values:", "is None:"),
    ],
    of("test_deterministic", "megatrons_embedding_takes_its_deterministic_way_back"): [
        (MODELS + "model_provider.py", '"deterministic_mode": torch.are_deterministic_algorithms_enabled()', '"deterministic_mode": False'),
    ],
    of("test_flash", "each_package_is_asked_for_sums_in_one_order_where_torch_is"): [
        (MODELS + "flash.py", "{**own, **same_bits,", "{**own,"),
    ],
    of("test_deterministic", "top_p_sums_whole_numbers"): [
        (GENERATION + "sampling.py", "before >= max(1, round(p * UNITS))", "share >= max(1, round(p * UNITS))"),
    ],
    of("test_deterministic", "the_likeliest_token_stays_however_small_p_is"): [
        (GENERATION + "sampling.py", "max(1, round(p * UNITS))", "round(p * UNITS)"),
    ],
    of("test_generation", "repetition_limits_are_those_of_transformers"): [
        (GENERATION + "sampling.py", "logits_BV < 0, logits_BV * penalty, logits_BV / penalty", "logits_BV < 0, logits_BV / penalty, logits_BV / penalty"),
    ],
    of("test_hidden_matching", "hidden_states_are_matched_beside_cross_entropy_alone"): [
        (METHODS + "kd.py", "if not (kd_ratio or settings.hidden_coef):", "if not kd_ratio:"),
    ],
    of("test_chat_templates", "a_template_writes_the_tokenizers_own_end_whichever_is_taught"): [
        (DATA + "chat.py", "own_eos_token(self.tokenizer)", "self.tokenizer.eos_token"),
    ],
    of("test_evaluation", "scores_are_those_of_the_saved_answers"): [
        (EVALUATION + "evaluator.py", '{"response_length": len(tokens), ', '{"response_length": len(tokens) + 1, '),
        (EVALUATION + "evaluator.py", "for row, tokens in zip(rows, said):", "for row, tokens in zip(rows, responses):"),
        (EVALUATION + "scoring.py", "range(group.rank(), len(answers), group.size())", "range(group.rank(), 1, group.size())"),
    ],
    "tests/test_shared_weights.py": [
        ("megakd/models/shared_weights.py", "            module.config = config\n", "            pass\n"),
        ("megakd/models/shared_weights.py", "            module.hidden_dropout = 0.0\n", "            pass\n"),
        ("megakd/models/shared_weights.py", "            module.adapters = None\n", "            module.adapters = model.decoder.layers[0].mlp.linear_fc1.adapters\n"),
        ("megakd/models/shared_weights.py", "copy.deepcopy(parameter).requires_grad_(False)", "parameter"),
        ("megakd/teachers/moving_average.py", 'if name.startswith(adapters or ("",)))', 'if True)'),
        (TRAINER, "if config.models.teacher_ema is None else with_adapters_of_its_own(student)", "if True else student"),
        (CONFIG + "train.py", "not (elsewhere or is_another)", "not elsewhere"),
    ],
    "tests/test_mp_files.py": [
        ("megakd/models/mp_files.py", 'yield tensor.name, mapping.axis', 'yield tensor.name, 0'),
        ("megakd/models/mp_files.py", "        found, first = [], 0\n", "        found, first = [], 1\n"),
        ("megakd/models/mp_files.py", "first += size", "first += len(found)"),
        ("megakd/checkpointing/import_hf.py", "write_hf_folder(model, folder, hf, source)", "write_hf_folder(model, folder, hf)"),
        ("megakd/checkpointing/import_hf.py", "WindowedCheckpoint(model, mp_size=mp_size)", "WindowedCheckpoint(model)"),
    ],
    "tests/test_hub_cache.py": [
        ("megakd/models/hub_cache.py", "os.path.exists(path) or path.is_absolute()", "path.is_absolute()"),
        ("megakd/checkpointing/peft_folder.py", "beside if os.path.isdir(beside) else local_folder", "beside if True else local_folder"),
        ("megakd/checkpointing/fingerprint.py", 'folder = local_folder(folder, flag="--model")', "pass"),
    ],
    "tests/test_soft_prompt_files.py": [
        ("megakd/generation/answers.py", '"soft_prompt": self.soft_prompt}', '"soft_prompt": None}'),
        (EVALUATION + "evaluator.py", '"soft_prompt": self.soft_prompt}', '"soft_prompt": None}'),
        (EVALUATION + "evaluator.py", "LiveStudent(self.model, self.soft_prompt)", "LiveStudent(self.model)"),
        ("megakd/checkpointing/soft_prompt_folder.py", "if width != words:", "if False:"),
        ("megakd/generation/answers.py", "bos + soft, said + also", "bos, said + also"),
    ],
    "tests/test_best.py": [
        (EVALUATION + "held_out_answers.py", "greedy=greedy, seed=config.training.seed)", "greedy=True, seed=config.training.seed)"),
        (EVALUATION + "held_out_answers.py", "greedy=greedy, seed=config.training.seed)", "greedy=greedy, seed=0)"),
        (EVALUATION + "held_out_answers.py", "said = [ends.without_end(response) for response in responses]", "said = responses"),
        ("megakd/checkpointing/best.py", "self.sign = -1 if lower_is_better else 1", "self.sign = 1"),
        ("megakd/checkpointing/best.py", "self.sign * value <= self.sign * self.value", "self.sign * value < self.sign * self.value"),
        ("megakd/checkpointing/best.py", 'kept["value"] if kept.get("metric") == metric else None', "None"),
        ("megakd/checkpointing/native.py", "for path in found[:-kept]:", "for path in found[: 1 - kept or None]:"),
        ("megakd/preflight.py", " is not None or is_export(Path(config.output.save) / BEST)", " is not None"),
    ],
    of("test_evaluation", "a_response_that_has_ended_adds_nothing_and_samples_are_averaged", "exposure_bias_has_the_spread_of_its_ratio_and_none_where_it_is_undefined"): [
        (EVALUATION + "exposure_bias.py", "padded.cumsum(1).mean(0)", "padded.cumsum(1).sum(0)"),
        (EVALUATION + "exposure_bias.py", "row[first : first + length]", "row[:length]"),
        (EVALUATION + "exposure_bias.py", "(100 * (ratio - 1), 100 * residuals)", "(100 * ratio, 100 * residuals)"),
    ],
    of("test_evaluation", "held_out_losses_are_those_of_transformers_in_float64"): [
        (EVALUATION + "held_out.py", "Divergence(name).with_bias(q, p, vocabulary)", "Divergence(name).with_bias(p, q, vocabulary)"),
    ],
    "tests/test_metrics.py": [
        (EVALUATION + "metrics.py", "use_stemmer=True", "use_stemmer=False"),
        (EVALUATION + "metrics.py", "100.0 * any(", "100.0 * all("),
    ],
    of("test_attention", "entropy_and_mass_equal_an_independent_float64_computation"): [
        (EVALUATION + "attention.py", "torch.special.entr(attention_HQS).sum(-1).mean(-1)", "torch.special.entr(attention_HQS).mean(-1).mean(-1)"),
        (EVALUATION + "attention.py", "list(row.numbers)].sum(-1).mean(-1)", "list(row.queries)].sum(-1).mean(-1)"),
        (EVALUATION + "attention.py", "attention_HSS[:, list(row.queries)]", "attention_HSS[:, : len(row.queries)]"),
    ],
    of("test_attention", "numbers_are_those_of_the_question_and_not_of_the_template_or_the_answer", "queries_are_the_question_or_what_predicts_the_answer"): [
        (EVALUATION + "attention.py", "NUMBER.finditer(prompt, first, end)", "NUMBER.finditer(prompt)"),
        (EVALUATION + "attention.py", "range(len(sample.prompt) - 1, len(tokens))", "range(len(sample.prompt), len(tokens))"),
        (EVALUATION + "attention.py", 'if config.queries == "answer":', "if True:"),
    ],
    of("test_attention", "heads_are_listed_by_how_much_their_mass_rose_with_the_error_over_questions"): [
        (EVALUATION + "attention_report.py", "np.argsort(-of_mass.mean(0)", "np.argsort(of_mass.mean(0)"),
        (EVALUATION + "attention_report.py", "values.std(0, ddof=1) / count**0.5", "values.std(0, ddof=1)"),
    ],
    of("test_priming_recipe", "the_teacher_is_asked_in_evaluation_as_it_is_in_training", "the_teacher_learns_to_answer_each_text_in_its_way", "gsm8ks_first_questions_are_taken"): [
        ("scripts/recipes/prepare_priming.py", 'open_priming(name)(row["question"], "", row)', 'open_priming("none")(row["question"], "", row)'),
        ("scripts/recipes/prepare_priming.py", 'if text == "none" and rng.random() < SHORT:', "if rng.random() < SHORT:"),
        ("scripts/recipes/prepare_priming.py", "train[:valid]), (\"valid\", train[valid:])", "train[valid:]), (\"valid\", train[:valid])"),
    ],
    of("test_gsm8k", "the_number_of_a_written_reply"): [
        (EVALUATION + "gsm8k.py", "return -size if found[\"sign\"] else size", "return size"),
        (EVALUATION + "gsm8k.py", "value_of(found[\"whole\"] or \"0\") + ", ""),
        (EVALUATION + "gsm8k.py", "for found in reversed(list(STATED.finditer(reply))):", "for found in STATED.finditer(reply):"),
        (EVALUATION + "gsm8k.py", "STRICT: tuple[Rule, ...] = (boxed, after_phrase)", "STRICT: tuple[Rule, ...] = (after_phrase, boxed)"),
        (EVALUATION + "gsm8k.py", "(boxed, only_number_of_first_line, after_phrase, last_number)", "(boxed, after_phrase, only_number_of_first_line, last_number)"),
    ],
    "tests/test_reporting.py": [
        (REPORTING + "flops.py", "attention = 2 * seq_length * attention_width", "attention = 4 * seq_length * attention_width"),
        (REPORTING + "flops.py", "(6 if sizes.gated else 4)", "4"),
        (REPORTING + "jsonl.py", '<= resumed_iteration]', "< resumed_iteration]"),
        (REPORTING + "logger.py", "return due if evaluated else due + 1", "return due"),
        (REPORTING + "wandb_run.py", "if continued and file.is_file():", "if file.is_file():"),
        (REPORTING + "wandb_run.py", 'name=name or folder.name', 'name=name'),
        (REPORTING + "plots.py", "if not name.startswith((*PANELS, *COUNTS))]", 'if name.startswith("valid/")]'),
        (REPORTING + "stopwatch.py", "self._seconds.clear()", "pass"),
    ],
    "tests/test_bad_inputs.py|tests/test_config.py": [
        (CONFIG + "train.py", "if self.method not in methods and given[name] != usual[name]:", "if False:"),
        (CONFIG + "train.py", "if training.min_lr > training.lr:", "if False:"),
        (CONFIG + "methods/minillm.py", "if dropout := getattr(flags, name):", "if False:"),
        (CONFIG + "methods/base.py", "for group in (type(self), *self.shares)", "for group in (type(self),)"),
        (CONFIG + "fields.py", 'return f"must be at most {most}" if value > most else None', "return None"),
        ("megakd/preflight.py", "if whole % (micro * dp):", "if False:"),
        ("megakd/preflight.py", "check_context(folder, data.max_length, soft,", "check_context(folder, data.max_length, 0,"),
        ("megakd/preflight.py", "name not in MAY_CHANGE - fixed and then[name] != value", "False"),
    ],
    of("test_python_api", "a_call_cut_off_is_continued_with_the_same_objects_and_no_others", "objects_give_the_numbers_of_the_script"): [
        ("megakd/api.py", "if begun and fingerprint(target)", "if False and fingerprint(target)"),
        (RUNTIME + "initialize.py", "            leave()\n            for name in added:", "            for name in added:"),
        (RUNTIME + "initialize.py", "for name in added:", "for name in ():"),
        (TRAINER, "self.callbacks.on_evaluation(self.iteration, metrics)", "pass"),
        (TRAINER, "self.callbacks.on_iteration(self.iteration, metrics)", "self.callbacks.on_iteration(self.iteration, {})"),
    ],
    of("test_relayed_teachers", "a_teacher_in_its_own_layout_teaches_the_same[kd-TP1 DP4 taught by TP2 PP2]"): [
        (TEACHERS + "relay.py", "slice(lo - other, hi - other)", "slice(0, hi - lo)"),
        (TEACHERS + "relayed.py", "plan = relay.assign([batch.for_teacher for batch in batches], in_windows=relay.shares_ranks)", "plan = relay.assign(batches, in_windows=relay.shares_ranks)"),
    ],
    of("test_relayed_teachers", "a_teacher_in_its_own_layout_teaches_the_same[promptkd-PP2 DP2 taught by TP2 DP2]"): [
        (SCHEDULES, "broadcast_from_last_stage(sum(tokens))", "broadcast_from_last_stage(tokens[-1])"),
        (SCHEDULES, "        first += count\n", ""),
    ],
    of("test_relayed_teachers", "a_teacher_in_its_own_layout_teaches_the_same[minillm-TP2 PP2 taught by TP1 DP4]"): [
        (TEACHERS + "relay.py", "slice(lo - first, hi - first)", "slice(0, hi - lo)"),
    ],
    of("test_relayed_teachers", "a_teacher_in_its_own_layout_teaches_the_same[promptkd-DP2 taught by PP2 on its own ranks]"): [
        (TEACHERS + "relayed.py", "soft_prompt = self.attached.soft_prompt if prompted", "soft_prompt = self.attached.soft_prompt if not prompted"),
        (TEACHERS + "relayed.py", "plan = relay.assign([batch.for_teacher for batch in batches], in_windows=True)", "plan = relay.assign(batches, in_windows=True)"),
        (TEACHERS + "relayed.py", "head = relay.cut_head(relay.student, relay.teacher)", "head = relay.student.model and relay.student.model.output_weight()"),
    ],
    of("test_relayed_teachers", "rows_are_kept_of_micro_batches_in_flight_whatever_the_global_batch"): [
        (TEACHERS + "relay.py", "WINDOW * stages if in_windows else", "WINDOW * stages if False else"),
    ],
    of("test_offloaded_teacher", "an_offloaded_teacher_teaches_the_same_to_the_bit"): [
        (TEACHERS + "offloaded.py", "host.to(self.device, non_blocking=True, copy=True)", "host"),
        (TEACHERS + "offloaded.py", "for param in model.parameters() if param is not head]", "for param in model.parameters()]"),
        (TEACHERS + "offloaded.py", "            if not self.users:\n                self._put_away()", "            pass"),
        (METHODS + "minillm.py", 'with self.time("rollout"), self.teacher.on_device():', 'with self.time("rollout"):'),
    ],
    of("test_relayed_teachers", "a_run_with_a_teacher_on_its_own_rank_is_continued_to_the_bit_and_says_what_one_without_says"): [
        (TEACHERS + "relayed.py", "            tensor.copy_(tensors[name])", "            pass"),
    ],
    of("test_python_api", "mistakes_are_exceptions_and_leave_no_inputs"): [
        ("megakd/api.py", 'if self.tokenizer is not None and not objects.keys() & {*MODELS}:', "if False:"),
        ("megakd/api.py", "    config.check()\n", ""),
    ],
    "tests/kernel_tests/test_kl_div.py": [
        (KERNELS + "kl/rows.py", "coef * (self.kl_ac + (log_a - self.sum_c.log()))", "coef * self.kl_ac"),
        (KERNELS + "kl/rows.py", "ratio += u.sub_(w).mul_(coef)", "ratio += u.sub_(w)"),
        (KERNELS + "kl/rows.py", "scale_a = (A - top_a).exp()", "scale_a = torch.ones_like(A)"),
        (KERNELS + "shards.py", "min(width, max(0, self.valid_vocab - self.start(width)))", "min(width, max(0, self.valid_vocab))"),
    ],
    "tests/kernel_tests/test_fused_linear_kl.py": [
        (KERNELS + "heads/fused_linear.py", "torch.mul(dW, upstream, out=torch.empty_like(W))", "dW.to(W.dtype)"),
        (KERNELS + "heads/fused_linear.py", "(dh[i] * grad_N[:, None])", "(dh[i])"),
    ],
    "tests/kernel_tests/test_prompt_embedding.py": [
        (KERNELS + "prompt_embedding/rows.py", "prompt_PH if shard.rank == 0 else 0", "prompt_PH"),
        (KERNELS + "prompt_embedding/rows.py", "out_BTH[:, P:] += positions_TH[..., P:, :]", "out_BTH[:, P:] += positions_TH[..., :-P, :]"),
    ],
    of("test_stored_teacher", "a_key_is_of_what_the_teacher_reads_and_of_the_response"): [
        (CHECKPOINTS + "teacher_store.py", "digest(sample.for_teacher.prompt)", "digest(sample.prompt)"),
        (CHECKPOINTS + "teacher_store.py", "digest((sample.num_labels, *sample.response))", "digest(sample.response)"),
    ],
    of("test_stored_teacher", "one_store_serves_every_layout_and_batch_size"): [
        (TEACHERS + "stored.py", "slice(layout.tp_rank * width,", "slice(0,"),
    ],
    of("test_stored_teacher", "a_killed_command_goes_on_to_the_same_files"): [
        (TEACHERS + "caching.py", "missing[self.layout.dp_rank :: self.layout.dp_size]", "missing"),
        (TEACHERS + "caching.py", "if head or not targets_file(self.folder, i).is_file()", "if True"),
    ],
    of("test_stored_teacher", "the_writers_layout_changes_no_row"): [
        (TEACHERS + "caching.py", "torch.cat([found[i][name] for i in range(len(samples))])", "torch.cat([part[name] for part in found.values()])"),
    ],
    of("test_stored_teacher", "a_changed_row_or_response_is_refused_by_its_place", "a_changed_model_is_refused"): [
        ("megakd/run_data.py", "folders.store.check_texts(rows, where=rows.where)", "pass"),
        ("megakd/run_data.py", "filter(None, (loader.dataset, valid))", "filter(None, (loader.dataset,))"),
    ],
    of("test_stored_teacher", "a_changed_model_is_refused"): [
        ("megakd/loading.py", "                store.check_teacher(path)", "                pass"),
    ],
    of("test_stored_teacher", "a_changed_tokenizer_and_priming_are_refused", "a_temperature_needs_whole_distributions"): [
        ("megakd/preflight.py", "    store.check_conditioning(asdict(config.conditioning))\n", ""),
        ("megakd/preflight.py", 'if store.description.kind == "topk" and temperature != 1:', "if False:"),
    ],
    of("test_several_teachers", "two_routed_teachers_equal_two_runs_on_the_parts", "a_micro_batch_has_one_teacher"): [
        (TEACHERS + "several.py", "if batch.teacher == name", "if True"),
        (TEACHERS + "several.py", "dict(sorted(teachers.items()))", "dict(sorted(teachers.items(), reverse=True))"),
        (DATA + "batch.py", "[sample for sample in samples if sample.teacher == name]", "list(samples)[: len(name)]"),
    ],
    of("test_several_teachers", "a_run_with_two_teachers_is_the_same_on_replicas_and_evaluates_each_row_with_its_own"): [
        ("megakd/run_data.py", "valid = routed(open_responses(", "valid = (lambda rows, _: rows)(open_responses("),
        (TEACHERS + "build.py", "zip(folders.teachers, map(place, models))", "zip(folders.teachers, map(place, models[:1] * 2))"),
    ],
    of("test_quantised_teacher", "scales_of_a_row_are_those_of_all_its_columns", "a_quantised_teacher_is_the_model_of_its_numbers"): [
        (MODELS + "weight_only.py", "module.tp_group if isinstance(module, RowParallelLinear) else None", "None"),
        (MODELS + "weight_only.py", "dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)", "pass"),
        (MODELS + "weight_only.py", "return (pack(codes) if", "return (pack(codes) if False and"),
    ],
    of("test_stored_teacher", "a_quantised_teachers_targets_are_its_own"): [
        (TEACHERS + "build.py", 'if kind != "none":', "if False:"),
        (TEACHERS + "caching.py", 'if config.teacher_quantize == "none":', "if True:"),
    ],
    "tests/kernel_tests/test_topk.py": [
        (KERNELS + "topk/reference.py", "gap(log_p_rest_N, log_p_NB.amin(-1),", "gap(log_p_rest_N, log_p_NB.amax(-1),"),
        (KERNELS + "topk/reference.py", "gap(log_q_rest_N, log_q_max_N, log_p_rest_N, log_p_min_N)", "gap(log_q_rest_N, log_q_max_N, log_p_rest_N, log_p_rest_N)"),
        (KERNELS + "topk/loss.py", "stats_PKN[:, -1].amin(0)", "stats_PKN[0, -1]"),
    ],
}  # fmt: skip

MUTANTS = [Mutant(*change, tests) for tests, changes in GROUPS.items() for change in changes]
