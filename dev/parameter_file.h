// A flat array in the order of ParameterList -> a safetensors file: Hugging Face names, published sizes and orientation.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "trainer/parameters.h"
#include "trainer/safetensors.h"

// `scalars` become tensors of one element behind the parameters.
inline void write_parameter_file(const std::string& path, const ParameterList& list, const std::vector<float>& flat,
                                 const std::vector<std::pair<std::string, float>>& scalars = {}) {
    using Shape = SafetensorsWriter::Shape;
    std::vector<std::pair<std::string, Shape>> tensors;
    for (const Parameter& p : list.all) {
        const Shape matrix = p.file_transposed ? Shape{p.cols, p.rows} : Shape{p.rows, p.cols};
        tensors.push_back({p.name, p.is_vector ? Shape{p.count()} : matrix});
    }
    for (const auto& [name, value] : scalars) tensors.push_back({name, {1}});
    SafetensorsWriter writer(path, tensors);
    std::vector<float> values;
    for (const Parameter& p : list.all) {
        values.resize(size_t(p.count()));
        to_file_layout(p, flat.data() + p.offset, values.data());
        writer.append(p.name, values);
    }
    for (const auto& [name, value] : scalars) writer.append(name, {&value, 1});
    writer.publish();
}
