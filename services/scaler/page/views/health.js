/** Health: who answers, which processes there are, what has failed lately, and what the present state means. */

import { badge, h, panel, patch, table } from "../dom.js";
import { clock, number, plural, seconds, UNKNOWN } from "../format.js";

const MEANINGS = {
  starting: ["busy", "The scaler reads what there is. Whoever serves goes on serving."],
  loading: ["busy", "The HMM reads the checkpoint. Nothing is served before it is there."],
  attaching: ["busy", "Ranks map their memory. Nothing is served before all of them step."],
  serving: ["ok", "All ranks of the layout step."],
  degraded: [
    "warn",
    "Not all ranks step. Each layer needs all experts, so steps wait until a standby has taken the seat that is " +
      "empty; streams go on then, and no request is lost.",
  ],
  failed: ["bad", "Nothing is served, and it does not mend by itself: the reason says what to do."],
};
const FAULTS = [
  "rank_exited",
  "rank_ejected",
  "rank_ended",
  "operation_late",
  "device_failed",
  "loaded_without",
  "loss_refused",
  "policy_refused",
  "policy_unreadable",
  "orphans_found",
];
const HOUR_S = 3_600;

function build() {
  const lead = h("div", { class: "lead" });
  const parts = h("div", {});
  const processes = h("div", {});
  const ranks = h("div", {});
  const faults = h("div", {});
  const drawn = {};

  /** Draw a part where what it shows is not what it showed: who reads or selects something in it is not disturbed. */
  function draw(name, element, facts, make) {
    const text = JSON.stringify(facts);
    if (drawn[name] === text) return;
    drawn[name] = text;
    patch(element, make());
  }

  function update({
    now,
    devices,
    policy,
    layout,
    processes: launched,
    events,
    isPastTold,
    eventsRefused,
    connection,
  }) {
    const [tone, meaning] = MEANINGS[now.phase] ?? ["calm", ""];
    draw("lead", lead, [now.phase, now.reason, now.error], () => [
      h("p", {}, badge(tone, now.phase), ` ${now.reason}`),
      h("p", {}, meaning),
      now.error === null ? null : h("p", { class: "refused" }, `${now.error.code}: ${now.error.message}`),
    ]);
    const silent = policy?.load?.silent ?? null;
    const failed = [...devices.values()].filter((device) => device.failure);
    draw(
      "parts",
      parts,
      [now, silent, failed, connection.state].map((part) =>
        part?.cursor ? { ...part, cursor: "", devices: 0, ranks: 0 } : part,
      ),
      () => table("Who answers", ["part", "state", "what that means"], rows(now, silent, failed, connection)),
    );
    draw("processes", processes, launched, () => processList(launched));
    draw("ranks", ranks, layout?.ranks, () => rankTable(layout));
    const found = events.filter(({ event }) => FAULTS.includes(event.kind));
    draw("faults", faults, [found.map(({ id }) => id), isPastTold, eventsRefused, now.fence], () =>
      faultList(found, isPastTold, now.fence, eventsRefused),
    );
  }

  return {
    element: h(
      "div",
      {},
      panel("The deployment", lead),
      panel("Parts", parts),
      panel("Processes", processes),
      panel("Ranks", ranks),
      panel("Faults and restarts", faults),
    ),
    update,
  };
}

function rows(now, silent, failed, connection) {
  const answers = (is) =>
    is === null ? badge("calm", "not known") : is ? badge("ok", "answers") : badge("bad", "silent");
  const quiet =
    silent === null
      ? badge("calm", "not known")
      : silent.length
        ? badge("warn", `silent: ${silent.join(", ")}`)
        : badge("ok", "all are heard");
  return [
    [
      "scaler",
      connection.state === "live" ? badge("ok", "answers") : badge("bad", connection.state),
      `fencing epoch ${now.fence}: it grows with each restart. While none runs, serving goes on and nothing is scaled`,
    ],
    ["HMM", answers(now.hmm_answers), "owns weights and KV; while it is silent ranks serve on, and nothing is scaled"],
    [
      "devices",
      now.num_devices === null
        ? badge("calm", "not known")
        : failed.length
          ? badge("bad", `failed: ${failed.map(({ name }) => name).join(", ")}`)
          : badge("ok", "all can be used"),
      failed.length
        ? failed.map(({ name, failure }) => `${name}: ${failure}`).join("; ")
        : "one that its driver has given up takes no replica",
    ],
    [
      "worker pool",
      answers(now.pool_answers),
      "starts and watches ranks; while it is silent ranks serve on, and none is replaced",
    ],
    [
      "standbys",
      now.standby_processes === null
        ? badge("calm", "not known")
        : badge(now.standby_processes > 0 ? "ok" : "warn", number(now.standby_processes)),
      "processes that wait for a seat: without one a rank that dies is replaced in seconds instead of milliseconds",
    ],
    [
      "load reports",
      quiet,
      "routers and ranks tell their load once a second; while one is silent the policy takes nothing away",
    ],
  ];
}

const TONES = { running: "ok", ended: "warn", restarting: "warn", failing: "bad" };

function processList(launched) {
  if (launched === null) return h("p", {}, "Loading…");
  if (!launched.is_known) return h("p", {}, `Not known: ${launched.reason}.`);
  return table(
    "What the launcher keeps running",
    ["process", "state", "pid", "restarts", "why"],
    launched.processes.map((process) => [
      process.name,
      badge(TONES[process.state], process.state),
      process.pid === null ? UNKNOWN : String(process.pid),
      number(process.restarts),
      process.reason === null ? "" : `${process.reason}; it starts again at ${clock(process.starts_unix)}`,
    ]),
  );
}

function rankTable(layout) {
  if (layout === null) return h("p", {}, "No layout is known yet.");
  return table(
    [`${plural(layout.ranks.length, "rank")}, epoch ${layout.epoch}`, ...layout.computes_by].join("; "),
    ["rank", "device", "state", "process", "pid", "attached in", "experts"],
    layout.ranks.map((rank) => [
      `r${rank.replica}t${rank.tp}`,
      rank.device,
      rank.ready ? badge("ok", rank.state) : badge("warn", "not ready"),
      rank.incarnation ?? UNKNOWN,
      rank.pid === null ? UNKNOWN : String(rank.pid),
      rank.attach_ms === null ? UNKNOWN : seconds(rank.attach_ms / 1000),
      number(rank.experts),
    ]),
  );
}

/** `fence`: the scaler's, with which the names of its events begin; there may be some of earlier ones. */
function faultList(found, isPastTold, fence, refused) {
  if (!isPastTold) return h("p", {}, refused ? `None can be told for now: ${refused}.` : "Loading…");
  const own = found.filter(({ id }) => id.startsWith(`${fence}-`)).length;
  if (found.length === 0) return h("p", {}, "None since this scaler began.");
  const since = Date.now() / 1000 - HOUR_S;
  const recent = found.filter(({ event }) => event.time_unix > since).length;
  return [
    h("p", {}, `${plural(recent, "fault")} in the last hour, ${own} since this scaler began.`),
    table(
      "Newest first",
      ["when", "what", "who", "why"],
      found
        .slice(0, 50)
        .map(({ id, event }) => [
          h("a", { href: `#/events/${id}` }, clock(event.time_unix)),
          event.kind.replaceAll("_", " "),
          event.facts.rank ?? event.facts.device ?? event.facts.replicas ?? event.facts.op_id ?? "",
          event.reason,
        ]),
    ),
  ];
}

export const health = { title: "Health", needs: ["policy", "layout", "events", "processes"], build };
