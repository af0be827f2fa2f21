"""Telemetry, read from fake sysfs trees and a fake NVML."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jmp_deploy.bench import bench, telemetry
from jmp_deploy.bench.host import Host, Reading
from jmp_deploy.bench.jetson import Jetson
from jmp_deploy.bench.nvml import REASONS, Nvml
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.errors import EngineError
from tests.fakes.bench import QUICK, FakeBackend, artifact


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


HWMON = "sys/class/hwmon"
DEVFREQ = "sys/class/devfreq/17000000.gpu"
ORIN_NX = {
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/meminfo": "MemTotal:       8000000 kB\nMemFree: 100 kB\nMemAvailable:   3904000 kB\n",
    f"{HWMON}/hwmon0/name": "pwmfan\n",
    f"{HWMON}/hwmon1/name": "ina3221\n",
    f"{HWMON}/hwmon1/in1_label": "VDD_IN\n",
    f"{HWMON}/hwmon1/in1_input": "5000\n",
    f"{HWMON}/hwmon1/curr1_input": "2400\n",
    f"{HWMON}/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    f"{HWMON}/hwmon1/in2_input": "5000\n",
    f"{HWMON}/hwmon1/curr2_input": "800 mA\n",
    f"{HWMON}/hwmon1/in3_label": "NC\n",
    f"{HWMON}/hwmon1/in3_input": "1\n",
    f"{HWMON}/hwmon1/curr3_input": "1\n",
    f"{HWMON}/hwmon1/in7_label": "sum of shunt voltages\n",
    f"{HWMON}/hwmon2/name": "soctherm_oc\n",
    f"{HWMON}/hwmon2/oc1_event_cnt": "3\n",
    f"{DEVFREQ}/cur_freq": "612000000\n",
    f"{DEVFREQ}/min_freq": "306000000\n",
    f"{DEVFREQ}/max_freq": "918000000\n",
    f"{DEVFREQ}/device/load": "730\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51000\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "48500\n",
    "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
}


def jetson(root: Path, files: dict[str, str], answer: str = "NV Power Mode: MAXN\n0\n") -> Jetson:
    found = Jetson.open(tree(root, files), lambda command: answer)
    assert found is not None
    return found


# --- Jetson -------------------------------------------------------------------------------------


def test_orin_nx_is_read_as_its_documentation_says(tmp_path):
    board = jetson(tmp_path, ORIN_NX)
    reading = board.read()
    assert reading.power_w == pytest.approx(12.0)  # VDD_IN is the module: 5 V x 2.4 A
    assert reading.gpu_mhz == 612
    assert reading.temperature_c == 48.5
    assert reading.memory_mb == pytest.approx(4096000 / 1024)
    assert reading.events == {"over-current (oc1)": 3}
    assert reading.throttled == ()
    facts = board.facts()
    assert facts["board"].startswith("NVIDIA Jetson Orin NX") and "\0" not in facts["board"]
    assert facts["power_mode"] == "MAXN" and facts["power_of"] == "VDD_IN"
    assert facts["jetson_clocks"] is False and facts["gpu_mhz_limit"] == 918
    assert board.others() == ["the GPU is 73 % busy"]


def test_agx_orin_adds_its_rails_and_counts_none_twice(tmp_path):
    files = {"proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0"}
    rails = (
        ("hwmon3", 1, "VDD_GPU_SOC", 1000),
        ("hwmon3", 2, "VDD_CPU_CV", 500),
        ("hwmon3", 3, "VIN_SYS_5V0", 250),
        ("hwmon4", 2, "VDDQ_VDD2_1V8AO", 100),
    )
    for chip, channel, label, amps in rails:
        files[f"{HWMON}/{chip}/name"] = "ina3221"
        files[f"{HWMON}/{chip}/in{channel}_label"] = label
        files[f"{HWMON}/{chip}/in{channel}_input"] = "4000"
        files[f"{HWMON}/{chip}/curr{channel}_input"] = str(amps)
    board = jetson(tmp_path, files)
    assert board.read().power_w == pytest.approx(4 * (1.0 + 0.5 + 0.25))
    assert board.facts()["power_of"] == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"


def test_input_monitor_of_thor_is_in_microwatts(tmp_path):
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        f"{HWMON}/hwmon5/name": "ina238",
        f"{HWMON}/hwmon5/power1_input": "43500000",
    }
    board = jetson(tmp_path, files)
    assert board.read().power_w == pytest.approx(43.5) and board.facts()["power_of"] == "VIN"


def test_fixed_clocks_and_thermal_throttling_are_noticed(tmp_path):
    files = {
        **ORIN_NX,
        f"{DEVFREQ}/min_freq": "918000000",
        "sys/class/thermal/cooling_device0/cur_state": "1",
        "sys/class/thermal/cooling_device1/type": "devfreq-17000000.gpu",
        "sys/class/thermal/cooling_device1/cur_state": "2",
        "sys/class/thermal/cooling_device2/type": "pwm-fan",
        "sys/class/thermal/cooling_device2/cur_state": "3",  # a fan that turns is no throttling
    }
    board = jetson(tmp_path, files)
    assert board.facts()["jetson_clocks"] is True
    assert board.read().throttled == (
        "temperature (cpu-throttle-alert)",
        "temperature (devfreq-17000000.gpu)",
    )


@pytest.mark.parametrize("text", ["", "garbage", "-", "0x1f", "NaN?"])
def test_values_that_cannot_be_read_are_left_out(tmp_path, text):
    odd = {name: text for name in ORIN_NX if not name.endswith(("name", "label", "type", "model"))}
    board = jetson(tmp_path, {**ORIN_NX, **odd}, answer="NVPM ERROR: no such file")
    assert board.read() == Reading()
    assert "power_mode" not in board.facts() and board.others() == []


def test_a_rail_that_fails_makes_no_wrong_sum(tmp_path):
    files = {
        "etc/nv_tegra_release": "# R36",
        f"{HWMON}/hwmon1/name": "ina3221",
        f"{HWMON}/hwmon1/in1_label": "VDD_GPU_SOC",
        f"{HWMON}/hwmon1/in1_input": "5000",
        f"{HWMON}/hwmon1/curr1_input": "1000",
        f"{HWMON}/hwmon1/in2_label": "VDD_CPU_CV",
        f"{HWMON}/hwmon1/in2_input": "5000",
        f"{HWMON}/hwmon1/curr2_input": "",
    }
    assert jetson(tmp_path, files).read().power_w is None


def test_other_machines_are_no_jetson(tmp_path):
    assert Jetson.open(tmp_path) is None
    board = Jetson.open(tree(tmp_path, {"etc/nv_tegra_release": "# R36"}))  # no nvpmodel here
    assert board is not None and board.read() == Reading()


# --- NVML ---------------------------------------------------------------------------------------


class FakeNvml:
    """The functions of pynvml that we call; `missing` ones another driver or package has not."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, NVML_DEVICE_MIG_ENABLE = 1, 2, 0, 1

    class NVMLError(Exception):
        pass

    def __init__(
        self, *, unsupported=(), missing=(), reasons=0, processes=0, busy=0, mig=0, init=None
    ):
        self.address = None
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByPciBusId": self.handle,
            "nvmlDeviceGetHandleByIndex": self.handle,
            "nvmlDeviceGetMigMode": lambda _: [mig, mig],
            "nvmlSystemGetDriverVersion": lambda: "580.65",
            "nvmlDeviceGetMaxClockInfo": lambda _, kind: {1: 1980}[kind],
            "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
            "nvmlDeviceGetPowerUsage": lambda _: 350_500,
            "nvmlDeviceGetTotalEnergyConsumption": lambda _: 1_000_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: reasons,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda _: reasons,
            "nvmlDeviceGetClockInfo": lambda _, kind: {1: 1755, 2: 2619}[kind],
            "nvmlDeviceGetTemperature": lambda _, sensor: {0: 61}[sensor],
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * 2**30, used=2**30),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=busy, memory=0),
            "nvmlDeviceGetComputeRunningProcesses_v2": lambda _: [object()] * processes,
            "nvmlDeviceGetComputeRunningProcesses_v3": lambda _: [object()] * processes,
        }
        self.names = list(answers)
        for name, answer in answers.items():
            if name in unsupported or (name == "nvmlInit" and init):
                answer = self.refuse
            if name not in missing:
                setattr(self, name, answer)

    def handle(self, address):
        self.address = address
        return object()

    def refuse(self, *_):
        raise self.NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    def open_nvml(**options) -> tuple[Nvml, FakeNvml]:
        package = FakeNvml(**options)
        monkeypatch.setitem(sys.modules, "pynvml", package)
        here = Gpu("Fake GPU", (9, 0), 1, "0000:17:00.0")
        monkeypatch.setattr("jmp_deploy.bench.nvml.gpus", lambda: (here,))
        return Nvml(), package

    return open_nvml


def test_nvml_reads_the_gpu_that_cuda_uses(nvml):
    gpu, library = nvml()
    assert library.address == "0000:17:00.0"
    reading = gpu.read()
    assert (reading.gpu_mhz, reading.memory_mhz, reading.temperature_c) == (1755, 2619, 61)
    assert (reading.power_w, reading.energy_j, reading.memory_mb) == (350.5, 1000.0, 1024)
    assert reading.throttled == ()
    facts = gpu.facts()
    assert facts["driver"] == "580.65" and facts["power_w_limit"] == 700
    assert facts["gpu_mhz_limit"] == 1980 and facts["memory_mb_total"] == 80 * 1024
    assert gpu.others() == []


def test_nvml_names_the_reasons_of_throttling_and_not_those_of_idling(nvml):
    # idle 0x1, application clocks 0x2, display 0x100 are no throttling
    gpu, _ = nvml(reasons=0x1 | 0x2 | 0x100 | 0x4 | 0x40 | 0x400)
    assert gpu.read().throttled == (
        *("power limit", "temperature (hardware)"),
        "reliability limit (voltage)",
    )


def test_every_reason_that_nvml_knows_is_told_or_is_a_setting():
    pynvml = pytest.importorskip("pynvml")
    every = pynvml.nvmlClocksThrottleReasonAll | pynvml.nvmlClocksEventReasonAll
    settings = (
        pynvml.nvmlClocksEventReasonGpuIdle
        | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
        | pynvml.nvmlClocksEventReasonDisplayClockSetting
    )
    assert sum(REASONS) == every & ~settings
    assert pynvml.NVML_DEVICE_MIG_ENABLE == FakeNvml.NVML_DEVICE_MIG_ENABLE


def test_under_mig_the_board_s_power_is_nobody_s(nvml, tmp_path):
    """Other instances draw from it too: no energy per image, and why."""
    gpu, _ = nvml(mig=1)
    reading = gpu.read()
    assert reading.power_w is reading.energy_j is None and reading.gpu_mhz == 1755
    facts = gpu.facts()
    assert "power_of" not in facts and "power_w_limit" not in facts
    asked = bench.BenchOptions(folder=artifact(tmp_path / "a"), settings=QUICK, batches=(1,))
    result, _ = bench.bench(asked, opener=lambda *_: FakeBackend(2.0), sources=[gpu])
    assert result["rows"][0]["mj_per_image"] is None
    assert any(
        "no energy per image: power cannot be read here: MIG is" in n for n in result["notes"]
    )


def test_nvml_tells_who_else_is_on_the_gpu(nvml):
    gpu, _ = nvml(processes=2, busy=37)
    assert gpu.others() == ["2 other processes on the GPU", "the GPU is 37 % busy"]
    old_driver, _ = nvml(processes=1, missing=("nvmlDeviceGetComputeRunningProcesses_v3",))
    assert old_driver.others() == ["1 other process on the GPU"]


def test_nvml_leaves_out_what_a_device_does_not_support(nvml):
    names = [n for n in FakeNvml().names if "Handle" not in n and "Init" not in n]
    for how in ("unsupported", "missing"):
        gpu, _ = nvml(**{how: names})
        assert gpu.read() == Reading() and gpu.others() == []
        assert gpu.facts() == {"power_of": "the GPU board"}


def test_nvml_of_another_driver_calls_throttling_by_another_name(nvml):
    gpu, _ = nvml(reasons=0x20, missing=("nvmlDeviceGetCurrentClocksThrottleReasons",))
    assert gpu.read().throttled == ("temperature (driver)",)


def test_without_driver_or_package_there_is_no_nvml_and_a_reason(nvml, monkeypatch, tmp_path):
    with pytest.raises(EngineError, match="NVML: Not Supported"):
        nvml(init=True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with telemetry.Monitor(telemetry.open_sources(gpu=True, root=tmp_path)) as monitor:
        assert not monitor.can_read_power()
    assert "nvidia-ml-py is not installed" in monitor.summary()["no_nvml"]


def test_what_we_call_is_in_nvidia_s_package():
    pynvml = pytest.importorskip("pynvml")
    assert all(hasattr(pynvml, name) for name in FakeNvml().names if not name.endswith("_v2"))
    for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(pynvml, name) == getattr(FakeNvml, name)
    assert issubclass(pynvml.NVMLError, Exception)


# --- host ---------------------------------------------------------------------------------------


def test_host_notices_other_load_and_throttling(tmp_path, monkeypatch):
    monkeypatch.setattr("jmp_deploy.bench.host.cpu_count", lambda: 4)
    cpu = "sys/devices/system/cpu/cpu0"
    root = tree(
        tmp_path,
        {
            "proc/loadavg": "3.50 2.00 1.00 4/200 1234\n",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n",
            f"{cpu}/thermal_throttle/core_throttle_count": "5\n",
            f"{cpu}/cpufreq/scaling_governor": "powersave\n",
            "sys/fs/cgroup/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 7\n",
        },
    )
    host = Host(root)
    assert host.others() == ["load average 3.5 on 4 CPUs"]
    assert host.facts() == {"cpu": "Some CPU @ 3 GHz", "cpus": 4, "cpu_governor": "powersave"}
    with telemetry.Monitor([host]) as monitor:
        tree(root, {f"{cpu}/thermal_throttle/core_throttle_count": "8\n"})
    assert monitor.throttled() == ["CPU throttled by temperature: 3 times"]
    tree(root, {"proc/loadavg": "0.10 2.00 1.00 4/200 1234\n"})
    assert host.others() == []


def test_host_without_proc_and_sys_is_silent(tmp_path):
    assert Host(tmp_path).others() == [] and Host(tmp_path).read() == Reading()


# --- monitor ------------------------------------------------------------------------------------


class Scripted:
    """A source that gives prepared readings, then its last one again."""

    name, live = "scripted", False

    def __init__(self, *readings: Reading) -> None:
        self.left = list(readings)

    def facts(self):
        return {"power_of": "this test"}

    def read(self):
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def others(self):
        return []


class Broken(Scripted):
    def facts(self):
        raise ZeroDivisionError

    read = others = facts


def at(*times: float):
    left = list(times)
    return lambda: left.pop(0)


def test_energy_counter_beats_the_mean_of_readings():
    source = Scripted(
        Reading(power_w=10, energy_j=100), Reading(power_w=90, energy_j=130), Reading(energy_j=150)
    )
    monitor = telemetry.Monitor([source], clock=at(0.0, 2.0, 4.0))
    for _ in range(3):
        monitor.poll()
    energy = monitor.energy(0.0, 4.0)
    assert energy is not None and energy.watts == pytest.approx((150 - 100) / 4.0)
    assert energy.how == "energy counter"


def test_mean_power_counts_readings_of_the_window_alone():
    source = Scripted(*(Reading(power_w=watts) for watts in (100, 20, 30, 40, 100)))
    monitor = telemetry.Monitor([source], clock=at(0, 1, 2, 3, 4))
    for _ in range(5):
        monitor.poll()
    energy = monitor.energy(1, 3)
    assert energy is not None and energy.watts == pytest.approx(30)
    assert monitor.energy(10, 20) is None


def test_a_broken_source_ends_nothing_and_the_next_one_answers():
    source = Scripted(Reading(temperature_c=40), Reading(temperature_c=70, throttled=("heat",)))
    with telemetry.Monitor([Broken(Reading()), source]) as monitor:
        assert monitor.others() == [] and not monitor.can_read_power()
    summary = monitor.summary()
    assert summary["temperature_c"] == {"min": 40, "median": 55, "max": 70}
    assert summary["throttled"] == ["heat"] and "gpu_mhz" not in summary


def test_a_live_source_is_read_all_the_while(monkeypatch):
    source = Scripted(Reading(power_w=1.0))
    source.live = True
    with telemetry.Monitor([source], interval=0.001) as monitor:
        while monitor.summary()["readings"] < 5:
            pass
    assert monitor._thread is not None and not monitor._thread.is_alive()


def test_first_source_that_knows_a_quantity_counts():
    first = Scripted(Reading(power_w=12.0))
    second = Scripted(Reading(power_w=99.0, gpu_mhz=600.0))
    merged = telemetry.Monitor([first, second]).poll()
    assert (merged.power_w, merged.gpu_mhz) == (12.0, 600.0)


def test_sources_of_this_machine_can_be_read():
    with telemetry.Monitor(telemetry.open_sources(gpu=True)) as monitor:
        pass
    assert monitor.summary()["cpus"] >= 1
