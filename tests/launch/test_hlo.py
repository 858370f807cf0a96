"""The reader of compiled programs: what is communicated, how often, over how many bytes."""

import pytest

from sleep_jax.launch import aot, hlo

PROGRAM = """
HloModule jit_step

%gather.1 (p: f32[2,4]) -> f32[8,4] {
  ROOT %all-gather.9 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%gather.2 (p: f32[2,4]) -> f32[8,4] {
  ROOT %all-gather.10 = f32[8,4]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%inner (p: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %all-reduce.1 = bf16[16]{0} all-reduce(%x), channel_id=3, to_apply=%add
}

%inner_condition (p: (s32[], bf16[16])) -> pred[] {
  %constant.1.clone = s32[]{:T(128)} constant(3)
  %constant.2 = s32[]{:T(128)} constant(99)
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.2, %constant.1.clone), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %fusion.1 = f32[8,4]{1,0} fusion(%a), kind=kOutput, calls=%gather.1
  %fusion.2 = f32[8,4]{1,0} fusion(%a), kind=kOutput, calls=%gather.2
  %while.2 = (s32[], bf16[16]) while(%t), condition=%inner_condition, body=%inner
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %unknown = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body, TRIPS
  %collective-permute-start.1 = (u8[6]{0}, u8[6]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=4
  %collective-permute-done.1 = u8[6]{0} collective-permute-done(%collective-permute-start.1)
  %all-to-all.1 = pred[4]{0} all-to-all(%z), channel_id=5
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_loops_multiply_and_a_channel_counts_once():
  assert hlo.collectives(PROGRAM) == {
    "all-gather": (5, 5 * 8 * 4 * 4),
    "all-reduce": (15, 15 * 16 * 2),
    "collective-permute": (1, 6),
    "all-to-all": (1, 4),
  }


def test_a_loop_without_a_trip_count_counts_once():
  text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
  assert hlo.collectives(text)["all-gather"][0] == 1
  assert hlo.collectives(text)["all-reduce"][0] == 3


def test_a_program_without_collectives():
  assert hlo.collectives("ENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %a = f32[8] add(%x, %x)\n}") == {}


@pytest.mark.parametrize(
  ("message", "found"),
  [
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for"
      " HLO temporaries (664.5G) exceeds available HBM (15.75G). HLO module: jit_dispatch.",
      {"needed": int(664.5 * 2**30), "had": int(15.75 * 2**30)},
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
      {"needed": int(20.5 * 2**30), "had": int(15.75 * 2**30)},
    ),
    ("RESOURCE_EXHAUSTED: something new", {}),
    ("INTERNAL: Mosaic failed to compile", None),
  ],
)
def test_the_compilers_refusal_is_read(message, found):
  assert aot.read_exhausted(message) == found
