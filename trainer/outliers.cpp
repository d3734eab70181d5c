#include "trainer/outliers.h"

#include <cmath>
#include <limits>

namespace {
constexpr int64_t kLag = 2;
}

void OutlierDetector::add(const RecentStep& step) {
    if (window_ == 0 || !std::isfinite(step.loss) || !std::isfinite(step.grad_norm)) return;
    recent_.push_back(step);
    const size_t most = size_t(window_) + size_t(kLag);
    if (recent_.size() > most) recent_.erase(recent_.begin(), recent_.end() - ptrdiff_t(most));
}

OutlierDetector::Statistics OutlierDetector::statistics(int64_t step, float RecentStep::*field) const {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    size_t end = recent_.size();
    while (end > 0 && recent_[end - 1].step > step - kLag) --end;
    if (window_ == 0 || end < size_t(window_)) return {kNan, kNan};
    double sum = 0, squares = 0;
    for (size_t i = end - size_t(window_); i < end; ++i) sum += double(recent_[i].*field);
    const double mean = sum / window_;
    for (size_t i = end - size_t(window_); i < end; ++i) squares += (double(recent_[i].*field) - mean) * (double(recent_[i].*field) - mean);
    return {mean, std::sqrt(squares / window_)};
}

float OutlierDetector::Statistics::limit(double z) const {
    const double value = mean + z * deviation;
    return std::isnan(value) ? std::numeric_limits<float>::infinity() : float(value);
}
