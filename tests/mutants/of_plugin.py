"""Slips in the plugin."""

from .mutant import PLUGIN, named

ATTENTION, CACHE, CONFIG, DROPOUT, MASK, TOLD = (
    f"hf_linattn/{name}.py" for name in ("attention", "cache", "config", "dropout", "mask", "told")
)
LAYERS, ROLLBACK, PACKING, COUNTED = (f"hf_linattn/{name}.py" for name in ("layers", "rollback", "packing", "counted"))

MUTANTS = [
    *named(
        PLUGIN,
        # whose dropout wins
        ("the config's dropout above set_dropout's", ATTENTION, 'p: Number | None = getattr(module, "linattn_dropout_p", options.dropout)',
         'p: Number | None = options.dropout if options.dropout is not None else getattr(module, "linattn_dropout_p", None)'),
        ("the model's dropout above the config's", ATTENTION, "p = dropout if p is None else p", "p = dropout or p"),
        ("a dropout of 0 in the config taken for none", ATTENTION, "p = dropout if p is None else p", "p = dropout if not p else p"),
        ("the kind of dropout left at its default", ATTENTION, '"dropout_kind": options.dropout_kind}', '"dropout_kind": "paper"}'),
        # noise by the clock
        ("noise one step late", DROPOUT, "self.schedule(state.global_step)", "self.schedule(max(state.global_step - 1, 0))"),
        ("noise never lowered", DROPOUT, "self.schedule(state.global_step)", "self.schedule(0)"),
        ("noise that the model never gets", DROPOUT, "current.fill_(p)", "pass"),
        ("a cosine that is right at both ends and in the middle", DROPOUT, "math.cos(math.pi * done)", "math.cos(math.pi * done) ** 3"),
        ("a schedule kept from the training before", DROPOUT, "if self.kind is not None:",
         "if self.kind is not None and not isinstance(self.schedule, DropoutSchedule):"),
        # resets and crops
        ("tokens recorded before a reset kept", CACHE, "reader._recent, reader.is_incomplete = None, False",
         "reader.is_incomplete = False"),
        ("reads counted on through a reset", CACHE, "is_incomplete = None, False\n        self._reads = None",
         "is_incomplete = None, False"),
        ("padding remembered through a reset", CACHE, "reader._remember(torch.zeros_like(reader.left_out))", "pass"),
        ("a state that a crop shares with its snapshot", CACHE, "if state is None else state.clone())", "if state is None else state)"),
        ("a snapshot that is written on", CACHE, "None if before is None else before.clone()", "before"),
        ("padding of cropped tokens still remembered", CACHE, "self._remember(joined(self.left_out, -dropped))", "pass"),
        ("padding replayed as tokens", ROLLBACK, "self.real[:, :count])", "None)"),
        ("more folded in than is let go", ROLLBACK, "self.state = self.after(self.count - KEPT_TOKENS)",
         "self.state = self.after(KEPT_TOKENS)"),
        ("recent tokens that do not follow their sequence", CACHE, "self._recent.map_batch(function)", "pass"),
        ("second readers that do not follow their sequence", CACHE, "            reader._map_batch(function)", "            pass"),
        ("second readers that record nothing", CACHE, "reader.record_past = self.record_past", "pass"),
        ("gradients through a cache", CACHE, "        self.state = state.detach()\n\n    def get_mask_sizes",
         "        self.state = state\n\n    def get_mask_sizes"),
        ("a program that is exported and never begins anew", CACHE, "state.masked_fill_(self.cumulative_length == key.shape[-2], 0)",
         "pass"),
        # masks
        ("the second thousand rows of a mask function never looked at", MASK, "columns[offset:].split(ROWS_AT_ONCE)",
         "columns[offset : offset + ROWS_AT_ONCE].split(ROWS_AT_ONCE)"),
        ("what lies just outside a window held against it", MASK, ".abs() < self.window)", ".abs() <= self.window)"),
        ("a bias of hundreds taken for a mask", TOLD, "NEVER_SEEN = -1e4", "NEVER_SEEN = -1e2"),
        ("a window one token wider", TOLD, "(distance < window if causal", "(distance <= window if causal"),
        ("what a window hides of the past believed", TOLD, "past = torch.where(follows, past, SAYS_NOTHING)", "pass"),
        ("a mask that says nothing of the past refused", TOLD, "(counted == told) | (told == SAYS_NOTHING)", "(counted == told)"),
        ("the past compared for the first layer's sake alone", TOLD, "    require(same.all(), OTHER_PAST)\n", ""),
        ("digests that add up", COUNTED, "numbers = numbers * numbers % PRIME", "pass"),
        ("the past's columns numbered anew", COUNTED, "device=left_out.device) + first)", "device=left_out.device) + 0 * first)"),
        ("groups at position 0 taken for sequences", PACKING, "are_groups = (repeats & (positions > 0)).any(-1, keepdim=True) |",
         "are_groups ="),
        ("a rise in position taken for a start", PACKING, "starts = (positions < before) |",
         "starts = (positions < before) | (positions > before + 1) |"),
        ("positions remembered although written", "hf_linattn/values.py", "known[0] == written and", ""),
        # encoders
        ("no gradient through bidirectional attention", ATTENTION,
         "out: Any = linear_attention(query, key, value, causal=causal,",
         "query, key, value = (x if causal else x.detach() for x in (query, key, value))\n"
         "        out: Any = linear_attention(query, key, value, causal=causal,"),
        ("no gradient through the keys of bidirectional attention", ATTENTION,
         "out: Any = linear_attention(query, key, value, causal=causal,",
         "out: Any = linear_attention(query, key if causal else key.detach(), value, causal=causal,"),
        ("the model's own scale of scores left out", ATTENTION, "(query.shape[-1] ** -0.5 if scaling is None else scaling)",
         "(query.shape[-1] ** -0.5)"),
        # bounds and options
        ("a bound of b for positive ones alone", CONFIG, "a < abs(b) * temperature", "a < b * temperature"),
        ("a bound of b with room of a hundredth", CONFIG, "a < abs(b) * temperature", "a < abs(b) * temperature * 0.99"),
        ("a discriminant with room of a tenth", CONFIG, "b * b > 4 * a * c:", "b * b > 4.4 * a * c:"),
        ("a negative dropout allowed", CONFIG, "not 0 <= self.dropout < 1", "not self.dropout < 1"),
        ("true for a layer's number", CONFIG, "any(isinstance(i, bool) or not isinstance(i, int) for i in layers)",
         "any(not isinstance(i, int) for i in layers)"),
        ("a bound that is reached", LAYERS, "_INSIDE = 0.999", "_INSIDE = 1.0"),
        ("vectors with weight decay",
         "hf_linattn/training.py", '[x for x in weights if x.ndim <= 1], "lr": learning_rate, "weight_decay": 0.0',
         '[x for x in weights if x.ndim <= 1], "lr": learning_rate, "weight_decay": weight_decay'),
        # choice and adapters
        ("a refused choice that stays", "hf_linattn/choice.py", "config._attn_implementation_internal = implementation", "pass"),
        ("options left out of a saved config", "hf_linattn/choice.py", "output[NAME] = LinAttnConfig().to_dict()", "pass"),
        ("an adapter above what was asked for aloud", "hf_linattn/adapters.py", "running is None and not getattr(model, UNASKED, False)",
         "running is None and False"),
        ("an adapter's options above the model's own", "hf_linattn/adapters.py",
         "if running is None or LinAttnConfig.of(model.config) == LinAttnConfig():", "if True:"),
        ("softmax over keys that were handed over", "hf_linattn/hand_over.py", "if func in SOFTMAX:", "if False:"),
    ),
]  # fmt: skip
