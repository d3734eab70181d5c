#include "trainer/distributed/world.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>
#include <sstream>
#include <system_error>
#include <thread>

#include "trainer/distributed/host_communicator.h"
#include "trainer/distributed/mpi/plugin.h"

namespace {

constexpr int kDefaultPort = 29500;  // torchrun's

void mpi_check(const char* failed) { REQUIRE(failed == nullptr, "%s failed", failed); }

// MPI hangs where another rank never comes, and the watch starts only after the meeting. Time in which this process itself was
// stopped does not count: it wakes as its launcher ends it, when others have said who hangs.
class StartTimer {
  public:
    StartTimer(double timeout_s, Speaker& speaker, const Speaker::Line& line)
        : thread_([this, timeout_s, line, &speaker] {
              std::unique_lock lock(mutex_);
              for (double waited_s = 0; waited_s < timeout_s;) {
                  const Clock::time_point start = Clock::now();
                  if (done_.wait_for(lock, std::chrono::milliseconds(100), [&] { return over_; })) return;
                  waited_s += std::min(seconds_since(start), 1.0);
              }
              speaker.end(line);
          }) {}
    ~StartTimer() {
        {
            const std::lock_guard lock(mutex_);
            over_ = true;
        }
        done_.notify_all();
        thread_.join();
    }

  private:
    std::mutex mutex_;
    std::condition_variable done_;
    bool over_ = false;
    std::thread thread_;
};

// `waiting`: the ranks of this machine that wait for it.
std::string mpi_has_not_started(const Launch& launch, double timeout_s, const std::set<int>& waiting) {
    std::string missing;
    for (int r = 0; r < launch.size; ++r)
        if (!waiting.contains(r)) missing += (missing.empty() ? "" : ", ") + std::to_string(r);
    if (launch.local_size == launch.size && !missing.empty())
        return message("rank %s of %d has not started MPI within %g s: it did not start, or is stopped, or hangs", missing.c_str(), launch.size, timeout_s);
    return message("rank %d of %d (%s): MPI has not started within %g s: another rank did not start, hangs, has no %s, or is not reached: look for its process, and for "
                   "mpirun's network (--mca btl_tcp_if_include)", launch.rank, launch.size, host_name().c_str(), timeout_s, kMpiPluginFile);
}

// The plugin lies where the program lies, or above it (tests).
std::string find_plugin() {
    namespace fs = std::filesystem;
    std::error_code none;
    fs::path folder = fs::read_symlink("/proc/self/exe", none).parent_path();
    for (int up = 0; up < 3; ++up, folder = folder.parent_path())
        if (fs::exists(folder / kMpiPluginFile, none)) return (folder / kMpiPluginFile).string();
    return "";
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Transports

// Everything goes to rank 0 and from there to everybody: simple, and slow with many ranks or much data. A group's ranks
// call it together with the other groups', as a program whose ranks all do the same does.
class World::TcpTransport final : public Transport {
  public:
    TcpTransport(World& world, std::vector<int> members) : world_(world), members_(std::move(members)) {}
    const char* name() const override { return "TCP"; }

    void all_gather(void* data, int64_t bytes) override {
        char* slices = static_cast<char*>(data);
        const size_t mine = index();
        const std::vector<std::string> all = world_.all_texts({slices + int64_t(mine) * bytes, size_t(bytes)});
        for (size_t i = 0; i < members_.size(); ++i) std::memcpy(slices + int64_t(i) * bytes, all[size_t(members_[i])].data(), size_t(bytes));
    }
    void all_to_all(void* data, int64_t bytes) override {
        char* slices = static_cast<char*>(data);
        const size_t mine = index();
        const std::vector<std::string> all = world_.all_texts({slices, size_t(bytes) * members_.size()});
        for (size_t i = 0; i < members_.size(); ++i)
            std::memcpy(slices + int64_t(i) * bytes, all[size_t(members_[i])].data() + int64_t(mine) * bytes, size_t(bytes));
    }

  private:
    size_t index() const { return size_t(std::find(members_.begin(), members_.end(), world_.rank()) - members_.begin()); }
    World& world_;
    std::vector<int> members_;
};

class World::MpiTransport final : public Transport {
  public:
    MpiTransport(const MpiFunctions& mpi, int color, int rank) : mpi_(mpi) { mpi_check(mpi_.split(color, rank, &group_)); }
    const char* name() const override { return "MPI"; }
    void all_gather(void* data, int64_t bytes) override { mpi_check(mpi_.all_gather(group_, data, bytes)); }
    void all_to_all(void* data, int64_t bytes) override { mpi_check(mpi_.all_to_all(group_, data, bytes)); }

  private:
    const MpiFunctions& mpi_;
    void* group_ = nullptr;
};

std::unique_ptr<Transport> World::transport_of(const std::vector<int>& members, int color) {
    if (mpi_) return std::make_unique<MpiTransport>(*mpi_, color, rank());
    return std::make_unique<TcpTransport>(*this, members);
}

const char* World::transport() const { return alone() ? "" : mpi_ ? "MPI" : "TCP"; }

// ---------------------------------------------------------------------------------------------------------------------
// Meeting

// MASTER_ADDR, or the launcher's word, or this machine; MASTER_PORT (torchrun: + 1), or one that follows from the job's name.
Meeting World::meeting_of_environment() const {
    Meeting meeting;
    meeting.addresses = {launch_.address.empty() ? "127.0.0.1" : launch_.address};
    meeting.port = launch_.port ? launch_.port : launch_.job.empty() ? kDefaultPort : 20000 + int(std::hash<std::string>()(launch_.job) % 10000);
    if (rank() == 0) meeting.listener = listen_on(meeting.port);
    if (launch_.launcher == "Open MPI")
        meeting.hint = message(" (rank %d meets over TCP as its program has no %s beside it, or cannot load it: if other ranks have one, build all alike)", rank(), kMpiPluginFile);
    return meeting;
}

Meeting World::meeting_over_mpi() {
    Meeting meeting;
    std::string mine;
    if (rank() == 0) {
        meeting.port = launch_.port;
        meeting.listener = listen_on(meeting.port);
        mine = std::to_string(meeting.port);
        if (!launch_.address.empty()) mine += " " + launch_.address;
        for (const std::string& address : own_addresses()) mine += " " + address;
    }
    constexpr int kBytes = 1024;
    REQUIRE(mine.size() < kBytes, "this machine has too many addresses: set MASTER_ADDR");
    std::vector<char> all(size_t(kBytes) * size_t(size()));
    std::memcpy(all.data() + int64_t(kBytes) * rank(), mine.data(), mine.size());
    MpiTransport(*mpi_, 0, rank()).all_gather(all.data(), kBytes);
    std::istringstream text(all.data());
    text >> meeting.port;
    for (std::string address; text >> address;) meeting.addresses.push_back(address);
    return meeting;
}

void World::load_mpi() {
    const std::string path = launch_.launcher == "Open MPI" ? find_plugin() : "";
    if (path.empty()) return;
    // Global: Open MPI's own plugins look for its symbols.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        if (rank() == 0) std::fprintf(stderr, "note: %s; the ranks talk over TCP\n", dlerror());
        return;
    }
    const auto functions = reinterpret_cast<decltype(&train_gpt_mpi_functions)>(dlsym(library, kMpiPluginSymbol));
    REQUIRE(functions, "%s: has no %s: build it again", path.c_str(), kMpiPluginSymbol);
    int rank = 0, size = 0;
    mpi_check(functions()->start(&rank, &size));
    REQUIRE(rank == launch_.rank && size == launch_.size, "MPI says rank %d of %d, mpirun's environment rank %d of %d: another MPI was built with than started the job",
            rank, size, launch_.rank, launch_.size);
    mpi_ = functions();
}

World::World(const Launch& launch, double timeout_s) : launch_(launch), host_(std::make_unique<SingleCommunicator>()) {
    if (alone()) return;
    setvbuf(stdout, nullptr, _IOLBF, 0);  // the watch may end the process at any time
    Speaker speaker(launch);
    try {
        Met met = meet(launch, arrange_meeting(timeout_s, speaker), timeout_s, speaker);
        peers_ = std::move(met.connections);
        local_rank_ = launch.local_rank >= 0 ? launch.local_rank : met.local_rank;
        watch_ = std::make_unique<Watch>(rank(), std::move(met.watched), timeout_s);
    } catch (const JobError& error) {
        speaker.end(error.what());
    } catch (const std::exception& error) {
        speaker.end(message("rank %d (%s): %s", rank(), host_name().c_str(), described(error).c_str()));
    }
    std::vector<int> everyone;
    for (int r = 0; r < size(); ++r) everyone.push_back(r);
    host_ = std::make_unique<HostCommunicator>(rank(), size(), transport_of(everyone, 0), watch_.get());
}

Meeting World::arrange_meeting(double timeout_s, Speaker& speaker) {
    const StartTimer timer(timeout_s, speaker, [&](const std::set<int>& ranks) { return mpi_has_not_started(launch_, timeout_s, ranks); });
    load_mpi();
    return mpi_ ? meeting_over_mpi() : meeting_of_environment();
}

World::~World() = default;

// ---------------------------------------------------------------------------------------------------------------------
// Messages, groups, agreement

namespace {

void send_text(Socket& to, const std::string& text) {
    const uint64_t bytes = text.size();
    to.send_all(&bytes, sizeof bytes);
    to.send_all(text.data(), text.size());
}

std::string receive_text(Socket& from) {
    uint64_t bytes = 0;
    from.receive_all(&bytes, sizeof bytes);
    std::string text(bytes, '\0');
    from.receive_all(text.data(), text.size());
    return text;
}

std::string joined(const std::vector<std::string>& texts) {
    std::string all;
    for (const std::string& text : texts) {
        const uint64_t bytes = text.size();
        all.append(reinterpret_cast<const char*>(&bytes), sizeof bytes).append(text);
    }
    return all;
}

std::vector<std::string> parted(const std::string& all) {
    std::vector<std::string> texts;
    for (size_t at = 0; at < all.size();) {
        uint64_t bytes = 0;
        std::memcpy(&bytes, all.data() + at, sizeof bytes);
        texts.push_back(all.substr(at + sizeof bytes, bytes));
        at += sizeof bytes + bytes;
    }
    return texts;
}

}  // namespace

std::vector<std::string> World::all_texts(const std::string& mine) {
    if (alone()) return {mine};
    const Watch::Waiting waiting(watch_.get(), "messages");
    try {
        return exchange_texts(mine);
    } catch (const Error&) {
        std::this_thread::sleep_for(std::chrono::seconds(2));  // a rank is gone: the watch knows which, and ends this process
        throw;
    }
}

std::vector<std::string> World::exchange_texts(const std::string& mine) {
    if (rank() != 0) {
        send_text(peers_[0], mine);
        return parted(receive_text(peers_[0]));
    }
    std::vector<std::string> texts{mine};
    for (int r = 1; r < size(); ++r) texts.push_back(receive_text(peers_[size_t(r)]));
    const std::string all = joined(texts);
    for (int r = 1; r < size(); ++r) send_text(peers_[size_t(r)], all);
    return texts;
}

std::unique_ptr<Communicator> World::split(int color) {
    const std::vector<std::string> colors = all_texts(std::to_string(color));
    std::vector<int> members;
    int mine = 0;
    for (int r = 0; r < size(); ++r) {
        if (colors[size_t(r)] != std::to_string(color)) continue;
        if (r == rank()) mine = int(members.size());
        members.push_back(r);
    }
    if (alone()) return std::make_unique<SingleCommunicator>();
    std::unique_ptr<Transport> transport = transport_of(members, color);  // also of one: MPI's split is a call of all ranks
    if (members.size() == 1) return std::make_unique<SingleCommunicator>();
    return std::make_unique<HostCommunicator>(mine, int(members.size()), std::move(transport), watch_.get());
}

void World::require_agreement(const std::vector<Fact>& facts) {
    std::vector<std::string> mine;
    for (const auto& [what, value] : facts) mine.insert(mine.end(), {what, value});
    const std::vector<std::string> all = all_texts(joined(mine));
    const std::vector<std::string> first = parted(all[0]);
    for (int r = 1; r < size(); ++r) {
        const std::vector<std::string> its = parted(all[size_t(r)]);
        for (size_t i = 0; i + 1 < std::min(first.size(), its.size()); i += 2) {
            if (first[i] != its[i] || first[i + 1] != its[i + 1])
                throw JobError(message("rank %d has %s %s, rank 0 has %s: start every rank with the same program, options and data", r, its[i].c_str(),
                                       its[i + 1].c_str(), (first[i] == its[i] ? first[i + 1] : first[i] + " " + first[i + 1]).c_str()));
        }
        if (first.size() != its.size()) throw JobError(message("rank %d has other options than rank 0: start every rank with the same program", r));
    }
}

std::string described(const std::exception& error) {
    if (dynamic_cast<const std::bad_alloc*>(&error)) return "not enough host memory: choose a smaller --model or --micro-batch";
    const auto* system = dynamic_cast<const std::system_error*>(&error);
    if (system && system->code() == std::errc::resource_unavailable_try_again) return "cannot start a thread: not enough host memory, or too many processes (ulimit -u)";
    return error.what();
}

void World::fail(const std::exception& error) {
    const bool whole_job = dynamic_cast<const JobError*>(&error) != nullptr;
    if (watch_) watch_->fail(described(error), whole_job);
    std::fprintf(stderr, "error: %s\n", described(error).c_str());
    _exit(1);
}

void World::report(const std::exception& error) {
    if (!alone()) fail(error);
    std::fprintf(stderr, "error: %s\n", described(error).c_str());
    throw Reported();
}

void World::finish() {
    if (alone()) return;
    all_texts("");  // nobody leaves before all are done
    if (mpi_) {
        const Watch::Waiting waiting(watch_.get(), "the end of MPI");  // which waits for all
        mpi_check(mpi_->finish());
    }
    watch_->goodbye();
}
