"""Buffers by name: XLA's account by hand, and of a program."""

import jax
import jax.numpy as jnp

from benchmarks.compiled import buffers

ACCOUNT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[32,32]| at ShapeIndex {}:
 value: <12 x.1 @0> (size=4096,offset=0): f32[32,32]{1,0}
allocation 5: size 9192, preallocated-temp:
 value: <13 dot.1 @0> (size=900,offset=0): f32[15,15]{1,0}
 value: <14 sine.2 @0> (size=1000,offset=0): f32[250]{0}
 value: <15 while.3{1} @0> (size=800,offset=1024): f32[200]{0}
allocation 6: size 700, preallocated-temp:
 value: <16 add.4 @0> (size=700,offset=0): bf16[350]{0}
"""
TEXT = """ENTRY %main (x.1: f32[32,32]) -> f32[] {
  %x.1 = f32[32,32]{1,0} parameter(0)
  %sine.2 = f32[250]{0} sine(%x.1), metadata={op_name="jit(f)/sin"}
  ROOT %add.4 = bf16[350]{0} add(%sine.2, %sine.2), metadata={op_name="jit(f)/add"}
}
"""


def test_largest_by_hand():
    # The dot reuses the memory of the sine. Arguments are not temporaries.
    assert buffers.largest(ACCOUNT, TEXT, 3) == [
        (1000, "f32[250]", "jit(f)/sin"),
        (800, "f32[200]", "while.3"),
        (700, "bf16[350]", "jit(f)/add"),
    ]
    assert len(buffers.largest(ACCOUNT, TEXT, 2)) == 2
    assert buffers.largest("", TEXT, 3) == []


def test_largest_of_a_program():
    def loss(x_ND):
        # The input of a sort lies in a buffer, whichever operations a compiler fuses.
        return jnp.sum(jnp.sort(x_ND @ x_ND.T, axis=0)[0])

    executable, account = buffers.compile_with_account(jax.jit(loss).lower(jnp.ones((512, 64))))
    (buffer,) = buffers.largest(account, executable.as_text(), 1)
    assert (buffer.bytes, buffer.shape) == (4 * 512 * 512, "f32[512,512]")
    assert "loss" in buffer.origin
