"""What TensorRT-RTX has and datacenter TensorRT 11.4 has not, of what we use: each needs a way without it."""

# Classes, and Class.attribute; every use must be guarded, see `_guarded` in trt_surface.py.
ALLOWED_RTX_ONLY = {
    "ComputeCapability": "names the GPUs that are built for; datacenter TensorRT builds for the GPU it runs on",
    "IBuilderConfig.num_compute_capabilities": "the same",
    "IBuilderConfig.set_compute_capability": "the same",
    "EngineInvalidityDiagnostics": "plans that are compiled elsewhere than they run",
    "EngineValidity": "plans that are compiled elsewhere than they run",
    "CudaGraphStrategy": "kernels that are compiled while a call waits",
    "DynamicShapesKernelSpecializationStrategy": "the same",
}

# Names that the runtime uses, which the double of datacenter TensorRT lacks; test_host_tensorrt.py compares.
RTX_ONLY = {
    "EngineValidity", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "get_engine_validity",
    "create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy",
}  # fmt: skip
