"""verl on a CPU: what stands for CUDA here. verl has to import it first, see run.sh."""

from functools import partial

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.utils import distributed


class NoDevice:
    """In place of torch.cuda: whatever it is told to do is nothing, and all it measures is 0."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0

    def get_device_name(self):
        return "CPU"

    def mem_get_info(self):
        return 0, 0


@PlatformRegistry.register("cpu")  # by VERL_PLATFORM=cpu
class PlatformCPU(PlatformCUDA):
    """One CPU, which Ray is told to count as a GPU (ray_init.num_gpus=1)."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self):
        return NoDevice()

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"

    def set_allocator_settings(self, settings):
        pass

    def is_ipc_supported(self):
        return False


# verl asks for a backend for the CPU and one for the device, which are the same here
start = distributed.initialize_global_process_group_ray
distributed.initialize_global_process_group_ray = partial(start, backend="gloo")
