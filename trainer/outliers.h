// Which steps are outliers: a loss or gradient norm far above those of the steps before it (as llm.c's detector).
//
// What a step is compared with are the last `window` steps up to two before it: then the device can decide while the host is
// a step behind, and the decision is a function of the run alone, not of when the host collected what. Steps that were
// skipped are none of them: they would make the next of their kind look normal.
#pragma once
#include <vector>

#include "trainer/parameters.h"

class OutlierDetector {
  public:
    OutlierDetector(int window, std::vector<RecentStep> recent) : window_(window), recent_(std::move(recent)) {}

    void add(const RecentStep& step);  // in order, those that were not skipped; one that is not finite is left out
    const std::vector<RecentStep>& recent() const { return recent_; }  // as many as are needed

    struct Statistics {
        double mean, deviation;  // NaN until the window is full
        double z(double value) const { return (value - mean) / deviation; }
        // The value from which on z is reached; infinite when it is unknown.
        float limit(double z) const;
    };
    Statistics losses(int64_t step) const { return statistics(step, &RecentStep::loss); }
    Statistics norms(int64_t step) const { return statistics(step, &RecentStep::grad_norm); }

  private:
    Statistics statistics(int64_t step, float RecentStep::*field) const;

    int window_;  // 0: nothing is ever an outlier
    std::vector<RecentStep> recent_;
};
