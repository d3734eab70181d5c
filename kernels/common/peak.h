// Peak rates of the GPUs this program runs on, for MFU and SOL. Dense, without sparsity; vendor datasheets.
#pragma once
#include <string>

struct Peak {
    const char* name_contains;
    double bf16_tflops, fp8_tflops, memory_tb_per_s;
};

// The first row whose text occurs in the device's name.
inline Peak peak_of(const std::string& device_name) {
    static constexpr Peak kTable[] = {
        {"H200", 989.4, 1978.9, 4.8},       {"H100 PCIe", 756.5, 1513.0, 2.0}, {"H100 NVL", 835.5, 1671.0, 3.9},
        {"H100", 989.4, 1978.9, 3.35},      {"A100", 312.0, 0.0, 2.0},         {"4090", 165.2, 330.3, 1.01},
        {"L40S", 362.1, 733.0, 0.86},
    };
    for (const Peak& row : kTable)
        if (device_name.find(row.name_contains) != std::string::npos) return row;
    return {"unknown", 0, 0, 0};
}
