// One answer, or two side by side: their texts, and a table of what each took.

const PARTS = [
  ["queue", "waiting in line", null],
  ["preprocess", "preparing the picture", null],
  ["vision", "vision encoder", "vision"],
  ["select", "choosing tokens", "input cut"],
  ["prefill", "reading the prompt", "prefix"],
];
const ENDED = {
  end: "done",
  stop: "done",
  length: "ended: longest answer reached",
  deadline: "ended: time limit reached",
  kv_limit: "ended: memory is full",
};
const TITLES = { pruned: "With pruning", whole: "Without pruning" };
const COLUMNS = { pruned: "pruned", whole: "unpruned" };
const $ = (id) => document.getElementById(id);

// Each answer: `kind` (pruned or whole), `text` (its element), what is known of its `times`, and at its end `receipt` and `usage`.
let shown = [];

export function begin(kinds) {
  const places = [["first-title", "answer"], ["second-title", "answer-whole"]];
  shown = kinds.map((kind, number) => ({ kind, text: $(places[number][1]), times: null, receipt: null, usage: null, pieces: 0 }));
  $("second").hidden = kinds.length < 2;
  kinds.forEach((kind, number) => {
    $(places[number][0]).textContent = TITLES[kind] ?? "";
    $(places[number][0]).hidden = !(kind in TITLES);
  });
  for (const each of shown) {
    each.text.textContent = "";
    each.text.classList.remove("empty");
  }
  $("answer-card").classList.add("asked");
  $("truth").hidden = true;
  showTable();
  return shown;
}

export async function read(answer, chunks) {
  // Returns the receipt.
  for await (const chunk of chunks) {
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      answer.text.append(text);
      answer.since ??= performance.now();
      answer.perToken = answer.pieces++ ? (performance.now() - answer.since) / (answer.pieces - 1) : null;
      $("progress").textContent = "answering …";
    }
    if (chunk.edgeprune) {
      answer.times = { ...chunk.edgeprune.times_ms, queue: chunk.edgeprune.queue_ms };
    }
    if (chunk.edgeprune?.finish_reason) {
      [answer.receipt, answer.usage] = [chunk.edgeprune, chunk.usage];
    }
    showTable();
  }
  if (answer.receipt === null) {
    throw new Error("The answer broke off.");
  }
  return answer.receipt;
}

export function ended(receipt) {
  const budget = receipt.tier ? `; kept: ${receipt.tier}` : "";
  return (ENDED[receipt.finish_reason] ?? receipt.finish_reason) + budget;
}

export function showTruth(answer) {
  $("truth").textContent = answer ? `The true answer: ${answer}` : "";
  $("truth").hidden = !answer;
}

function showTable() {
  const begun = shown.filter((each) => each.times?.prefill !== undefined);
  $("times").hidden = begun.length === 0;
  const [two, reused] = [shown.length > 1, begun.some((each) => each.receipt?.reused.length)];
  const most = Math.max(...begun.map(firstToken));
  $("reused").hidden = !reused;
  $("bars").replaceChildren(...(two && reused ? [] : begun).map((each) => bar(each, most))); // side by side they would mislead
  $("columns").replaceChildren(...(two ? [row("", shown.map((each) => COLUMNS[each.kind]), "th")] : []));
  $("parts").replaceChildren(...PARTS.map(([name, label, reuse], number) => {
    const item = row(label, shown.map((each) => part(each, name, reuse)));
    const mark = document.createElement("i");
    mark.className = `part-${number + 1}`;
    item.firstChild.prepend(mark);
    return item;
  }));
  $("figures").replaceChildren(...figures().map(([label, values]) => row(label, values)));
}

function part(answer, name, reuse) {
  if (answer.times?.[name] === undefined) {
    return "";
  }
  const reused = reuse && answer.receipt?.reused.includes(reuse);
  return ms(answer.times[name]) + (reused ? " †" : "");
}

const firstToken = ({ times }) => PARTS.reduce((sum, [name]) => sum + (times[name] ?? 0), 0);

function figures() {
  const done = (make) => shown.map((each) => (each.receipt ? make(each) : ""));
  return [
    ["first word after", shown.map((each) => (each.times?.prefill === undefined ? "" : ms(firstToken(each))))],
    ["each further token", shown.map(({ receipt, perToken }) => (receipt?.times_ms.per_token || perToken ? ms(receipt?.times_ms.per_token || perToken) : ""))],
    ["visual tokens in a layer", done(({ usage: { visual_tokens: { before, after } } }) => (before ? `${after} of ${before}` : "none"))],
    ["memory (KV cache)", done(({ receipt }) => `${(receipt.kv_bytes / 1024).toLocaleString("en", { maximumFractionDigits: 0 })} KiB`)],
    ["length", done(({ receipt }) => `${receipt.generated_tokens} tokens`)],
  ];
}

function row(label, values, tag = "td") {
  const item = document.createElement("tr");
  const head = document.createElement(label ? "th" : "td");
  head.textContent = label;
  if (label) {
    head.scope = "row";
  }
  item.append(head, ...values.map((value) => {
    const cell = document.createElement(tag);
    cell.textContent = value;
    if (tag === "th") {
      cell.scope = "col";
    }
    return cell;
  }));
  return item;
}

function bar(answer, most) {
  const whole = document.createElement("div");
  const parts = PARTS.map(([name], number) => {
    const piece = document.createElement("i");
    piece.className = `part-${number + 1}`;
    piece.style.flexBasis = `${100 * (answer.times[name] ?? 0) / most}%`;
    return piece;
  });
  whole.append(...parts);
  return whole;
}

export function ms(value) {
  return value === 0 ? "0 ms" : value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}
