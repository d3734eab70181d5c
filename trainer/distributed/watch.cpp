#include "trainer/distributed/watch.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "kernels/common/check.h"

enum class Kind : uint32_t { alive, failed, goodbye, leave };

struct Watch::Message {
    Kind kind;
    uint32_t waiting;
    uint64_t progress;
    char text[1008];
};

// A peer and what it said last.
struct Watch::Seen {
    Peer peer;
    Clock::time_point heard = Clock::now(), changed = Clock::now();
    uint64_t progress = 0;
    bool waiting = false, gone = false;
    char buffer[sizeof(Message)];
    size_t filled = 0;

    std::string name() const { return message("rank %d (%s, process %d)", peer.rank, peer.host.c_str(), peer.process); }
};

namespace {
constexpr double kTick = 0.1;  // s
constexpr double kPatience = 0.85;  // of the time-out, by which the job has ended
constexpr double kPatienceAfterFailure = 5;
constexpr double kTimeToName = 2;  // longer than signs of life are apart, by which ranks notice at different times

void copy_text(char (&to)[1008], const std::string& text) {
    const size_t n = std::min(text.size(), sizeof to - 1);
    std::memcpy(to, text.data(), n);
    to[n] = '\0';
}
}  // namespace

Watch::Watch(int rank, std::vector<Peer> peers, double timeout_s) : rank_(rank), patience_s_(kPatience * timeout_s), self_(std::make_unique<Seen>()), last_sent_(Clock::now()) {
    static_assert(sizeof(Message) == 1024);
    for (Peer& peer : peers) peers_.emplace_back().peer = std::move(peer);
    self_->peer = {.rank = rank, .host = host_name(), .process = getpid(), .connection = {}};
    if (!peers_.empty()) thread_ = std::thread([this] { watch_all(); });
}

Watch::~Watch() {
    leaving_ = true;
    if (thread_.joinable()) thread_.join();
}

void Watch::begin_waiting(const char* what) {
    waiting_for_ = what;
    waiting_ = true;
}

void Watch::end_waiting() {
    waiting_ = false;
    ++progress_;
}

void Watch::goodbye() {
    leaving_ = true;
    if (thread_.joinable()) thread_.join();
    Message bye{};
    bye.kind = Kind::goodbye;
    for (Seen& seen : peers_)
        if (!seen.gone) send(seen.peer.connection.file(), &bye, sizeof bye, MSG_NOSIGNAL);
}

void Watch::fail(const std::string& text, bool whole_job) {
    const std::string line = whole_job || peers_.empty() ? text : message("rank %d: %s", rank_, text.c_str());
    if (rank_ == 0 || leaving_) end_job(line);
    {
        const std::lock_guard lock(failure_lock_);
        failure_ = line;
        failed_ = true;
    }
    std::this_thread::sleep_for(std::chrono::duration<double>(kPatienceAfterFailure));  // rank 0 prints it and ends the job
    end_job(line);
}

// May run in either thread of a rank; whoever comes first prints.
void Watch::end_job(const std::string& line) {
    static std::atomic<bool> ended{false};
    if (ended.exchange(true)) pause();
    if (!line.empty()) std::fprintf(stderr, "error: %s\n", line.c_str());
    Message leave{};
    leave.kind = Kind::leave;
    if (rank_ == 0)
        for (Seen& seen : peers_) send(seen.peer.connection.file(), &leave, sizeof leave, MSG_NOSIGNAL | MSG_DONTWAIT);
    _exit(1);
}

void Watch::watch_all() {
    std::vector<pollfd> entries(peers_.size());
    Clock::time_point woke = Clock::now();
    while (!leaving_) {
        send_signs_of_life();
        for (size_t i = 0; i < peers_.size(); ++i) entries[i] = {peers_[i].gone ? -1 : peers_[i].peer.connection.file(), POLLIN, 0};
        poll(entries.data(), entries.size(), int(kTick * 1000));
        if (seconds_since(woke) > std::max(1.0, patience_s_ / 4)) {  // this process was stopped itself: what it did not hear proves nothing
            overslept_ = Clock::now();
            for (Seen& seen : peers_) seen.heard = seen.changed = Clock::now();
        }
        for (size_t i = 0; i < peers_.size(); ++i)
            if (entries[i].revents) receive(peers_[i]);
        woke = Clock::now();
        for (const Seen& seen : peers_) check_silence(seen);
        if (rank_ == 0) check_progress();
    }
}

void Watch::send_signs_of_life() {
    if (!failed_ && seconds_since(last_sent_) < std::min(1.0, patience_s_ / 8)) return;
    last_sent_ = Clock::now();
    Message m{};
    m.kind = Kind::alive;
    m.waiting = waiting_;
    m.progress = progress_;
    if (failed_.exchange(false)) {
        const std::lock_guard lock(failure_lock_);
        m.kind = Kind::failed;
        copy_text(m.text, failure_);
    }
    for (Seen& seen : peers_)
        if (!seen.gone) send(seen.peer.connection.file(), &m, sizeof m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void Watch::receive(Seen& seen) {
    const ssize_t got = recv(seen.peer.connection.file(), seen.buffer + seen.filled, sizeof(Message) - seen.filled, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) return peer_is_gone(seen, "died: it was killed, perhaps for want of memory, or crashed");
    seen.filled += size_t(got);
    if (seen.filled < sizeof(Message)) return;
    seen.filled = 0;
    Message m;
    std::memcpy(&m, seen.buffer, sizeof m);
    handle(seen, m);
}

void Watch::note_progress(Seen& seen, uint64_t progress, bool waiting) {
    if (progress != seen.progress || waiting != seen.waiting) seen.changed = Clock::now();
    seen.progress = progress;
    seen.waiting = waiting;
}

void Watch::handle(Seen& seen, const Message& m) {
    seen.heard = Clock::now();
    note_progress(seen, m.progress, m.waiting != 0);
    switch (m.kind) {
        case Kind::alive: break;
        case Kind::failed: end_job(std::string(m.text, strnlen(m.text, sizeof m.text)));
        case Kind::goodbye: seen.gone = true; break;
        case Kind::leave: end_job("");
    }
}

void Watch::check_silence(const Seen& seen) {
    if (!seen.gone && seconds_since(seen.heard) > patience_s_)
        peer_is_gone(seen, message("has given no sign of life for %g s: it is stopped, or its machine or network is gone", patience_s_));
}

// Rank 0 names others. What happens to rank 0 the next one names; the rest leave without a word, and after it: a launcher ends the
// job with the first rank that leaves. Whoever wakes to find others gone has been given up by them.
void Watch::peer_is_gone(const Seen& seen, const std::string& what) {
    if (leaving_) return;
    if (overslept_ && seconds_since(*overslept_) < kPatienceAfterFailure) end_job("");  // what they said before comes first
    if (rank_ > 1) std::this_thread::sleep_for(std::chrono::duration<double>(kTimeToName));
    end_job(rank_ <= 1 ? seen.name() + " " + what : "");
}

// The ranks that the others wait for are those that finished the fewest waits; of these, first those that do not wait.
void Watch::check_progress() {
    note_progress(*self_, progress_, waiting_);
    std::vector<const Seen*> ranks{self_.get()};
    for (const Seen& seen : peers_)
        if (!seen.gone) ranks.push_back(&seen);
    const auto stalled = [&](const Seen* s) { return s->waiting && seconds_since(s->changed) > patience_s_; };
    if (std::none_of(ranks.begin(), ranks.end(), stalled)) return;

    const uint64_t least = (*std::min_element(ranks.begin(), ranks.end(), [](auto a, auto b) { return a->progress < b->progress; }))->progress;
    const bool someone_ahead = std::any_of(ranks.begin(), ranks.end(), [&](const Seen* s) { return s->progress > least; });
    std::string busy, behind;
    for (const Seen* s : ranks) {
        if (s->progress != least) continue;
        std::string& names = s->waiting ? behind : busy;
        names += (names.empty() ? "" : ", ") + s->name();
    }
    if (busy.empty() && !someone_ahead)
        end_job(message("no rank has made progress for %g s (%s): the GPUs or the network between them hang", patience_s_, waiting_for_.load()));
    end_job(message("%s hangs: other ranks have waited for it for %g s", (busy.empty() ? behind : busy).c_str(), patience_s_));
}
