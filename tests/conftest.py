"""Eight virtual CPU devices for every test, so that sharded code runs anywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
