// The page of `edgeprune serve`: a picture in, streamed answers out, and what was kept of the picture drawn over it.

import * as answers from "./answers.js";
import * as picture from "./picture.js";
import { Refusal, ask as request, call } from "./server.js";

const $ = (id) => document.getElementById(id);
const PHASES = { loading: "loading the model", warming: "warming up", ready: "ready", busy: "answering", stopping: "stopping", gone: "not reached" };
const AUTOMATIC = "automatic"; // the runtime takes the best that the time limit allows
const FIELDS = { max_tokens: "tokens", temperature: "temperature", deadline_ms: "deadline", tier: "tier", messages: "prompt" };

const state = { card: null, samples: [], sample: null, ask: null };

// The model.

async function watchPhase() {
  let phase = "gone";
  try {
    phase = (await (await fetch("/health")).json()).phase;
    if (!state.card && (phase === "ready" || phase === "busy")) {
      await meetModel();
    }
  } catch {
    // it says "not reached" until the server is there again
  }
  $("lamp").className = phase;
  $("phase-text").textContent = PHASES[phase] ?? phase;
  setTimeout(watchPhase, phase === "loading" || phase === "warming" ? 400 : 2000);
}

async function meetModel() {
  const card = (await (await call("/v1/models")).json()).data[0];
  const { note, samples } = await (await call("/samples")).json();
  state.card = card;
  const { geometry, tiers, kind, cuts } = card.edgeprune;
  const clip = kind === "video" ? `${geometry.frames} frames of ` : "";
  const plan = cuts.length ? "" : ", nothing pruned";
  $("model").textContent = `${card.id}: ${clip}${geometry.width} × ${geometry.height} px, ${geometry.visual_tokens} visual tokens${plan}`;
  $("note").textContent = note;
  $("note").hidden = !note;
  $("mode-row").hidden = !cuts.length;
  $("budget").hidden = tiers.length < 2;
  $("tier").max = tiers.length; // the best stands on the right, and behind it the choice of the runtime
  $("tier").value = tiers.length;
  showTier();
  $("snippet").textContent = snippet();
  picture.begin(geometry, ready);
  await showSamples(samples);
  ready();
}

function tier() {
  const { tiers } = state.card.edgeprune;
  return tiers[tiers.length - 1 - Number($("tier").value)];
}

function showTier() {
  const name = tier() ?? AUTOMATIC;
  $("tier-name").textContent = name;
  $("tier").setAttribute("aria-valuetext", name);
}

function ready() {
  picture.nameCamera();
  const can = state.card && picture.isThere();
  $("ask").disabled = !can || state.ask !== null;
  $("hint").hidden = Boolean(can) || !state.card;
  for (const button of $("suggestions").children) {
    button.disabled = state.ask !== null;
  }
}

function snippet() {
  return `import base64, openai

client = openai.OpenAI(base_url="${location.origin}/v1", api_key="none")  # or the key of this server
data = base64.b64encode(open("picture.png", "rb").read()).decode()
content = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    {"type": "text", "text": "What is on the table?"},
]
answer = client.chat.completions.create(
    model=${JSON.stringify(state.card.id)},
    messages=[{"role": "user", "content": content}],
    extra_body={"prune": True},  # False: with all visual tokens
)
print(answer.choices[0].message.content)`;
}

// Samples.

async function showSamples(samples) {
  state.samples = samples;
  $("samples").hidden = samples.length === 0;
  if (samples.length) {
    $("ways").textContent = "Take a sample below, open a file, drop one here, or switch the camera on.";
  }
  const blobs = await Promise.all(samples.map(async (each) => (await call(each.picture)).blob()));
  const buttons = await Promise.all(blobs.map(async (blob, number) => {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    const bitmap = await createImageBitmap(blob);
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    button.type = "button";
    button.setAttribute("aria-label", `Sample ${number + 1} of ${samples.length}`);
    button.setAttribute("aria-pressed", "false");
    button.append(canvas);
    button.addEventListener("click", () => state.ask === null && openPicture([blob], number));
    return button;
  }));
  $("samples").replaceChildren(...buttons);
}

function suggest(number) {
  // The questions about a sample, or none.
  state.sample = number === null ? null : state.samples[number];
  [...$("samples").children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
  const buttons = (state.sample?.questions ?? []).map(({ prompt }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => {
      $("prompt").value = prompt;
      $("form").requestSubmit();
    });
    return button;
  });
  $("suggestions").replaceChildren(...buttons);
  $("suggestions").hidden = buttons.length === 0;
}

async function openPicture(blobs, sample = null) {
  await attempt(() => picture.open(blobs)) && suggest(sample);
  ready();
}

async function attempt(work) {
  // Shows what goes wrong; returns whether all went well.
  fail("");
  try {
    await work();
    return true;
  } catch (error) {
    fail(error.message);
    return false;
  }
}

// What is wrong with the fields.

function complain(id, message) {
  const field = $(id);
  $(`${id}-wrong`).textContent = message;
  $(`${id}-wrong`).hidden = !message;
  field.setAttribute("aria-invalid", String(Boolean(message)));
  if (message) {
    if ($("settings").contains(field)) {
      $("settings").open = true;
    }
    field.focus();
  }
}

function rule(field) {
  const kind = field.step === "1" ? "a whole number" : "a number";
  const range = field.max ? `from ${field.min} to ${field.max}` : `of at least ${field.min}`;
  return field.type === "number" ? `Give ${kind} ${range}${field.required ? "" : ", or leave it empty"}.` : "Type a question first.";
}

function check() {
  // Returns whether all fields are right. Messages stand beside their fields; the first wrong one gets the focus.
  const fields = ["prompt", "tokens", "temperature", "deadline"].map($);
  const blank = (field) => field.value.trim() === "" && field.id === "prompt";
  const wrong = fields.filter((field) => !field.validity.valid || blank(field));
  for (const field of [...fields, $("tier")].reverse()) {
    complain(field.id, wrong.includes(field) ? rule(field) : "");
  }
  return wrong.length === 0;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (message) {
    $("progress").textContent = "";
    $("answer-card").classList.add("asked");
    reveal();
  }
}

function reveal() {
  $("answer-card").scrollIntoView({ block: "nearest" });
}

// Asking.

function bodyOf(urls, pruned) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const content = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  content.push({ type: "text", text: $("prompt").value });
  return {
    model: state.card.id, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    max_tokens: number("tokens"), temperature: number("temperature"), deadline_ms: number("deadline"),
    prune: pruned, kept: true, tier: pruned ? tier() : undefined,
  };
}

async function ask() {
  const abort = new AbortController();
  state.ask = abort;
  const mode = $("mode-row").hidden ? "only" : $("mode").value;
  const asked = answers.begin(mode === "both" ? ["pruned", "whole"] : [mode]);
  begin();
  try {
    const urls = await picture.urls();
    let kept = [];
    for (const answer of asked) { // one after the other, so that neither slows the other down
      const receipt = await answers.read(answer, request(bodyOf(urls, answer.kind !== "whole"), abort.signal));
      $("progress").textContent = answer === asked.at(-1) ? answers.ended(receipt) : "now without pruning …";
      kept = receipt?.pictures?.length ? receipt.pictures : kept;
      picture.showKept(kept);
      reveal();
    }
    answers.showTruth(state.sample?.questions.find(({ prompt }) => prompt === $("prompt").value.trim())?.answer);
  } catch (error) {
    explain(error, abort.signal.aborted);
  }
  finish();
}

function begin() {
  fail("");
  picture.showKept([]);
  $("progress").textContent = "asking …";
  $("ask").hidden = true;
  $("stop").hidden = false;
  $("stop").focus();
  ready();
  reveal();
}

function explain(error, aborted) {
  if (aborted) {
    $("progress").textContent = "stopped";
    return;
  }
  fail(error instanceof Refusal ? error.message : error instanceof TypeError ? "The server cannot be reached." : error.message);
  const field = error instanceof Refusal ? FIELDS[error.param] : undefined;
  if (field) {
    complain(field, error.message);
  }
}

function finish() {
  state.ask = null;
  $("stop").hidden = true;
  $("ask").hidden = false;
  ready();
  if (document.activeElement === document.body) {
    $("ask").focus({ preventScroll: true }); // where the focus was, the button is gone
  }
}

// Controls.

$("camera").addEventListener("click", async () => {
  if (state.card && state.ask === null) {
    await attempt(picture.pressCamera) && suggest(null);
    ready();
  }
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => state.card && $("file").files.length && openPicture($("file").files));
$("tier").addEventListener("input", showTier);
$("stop").addEventListener("click", () => state.ask?.abort());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("ask").disabled && check()) {
    ask();
  }
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
for (const id of ["prompt", "tokens", "temperature", "deadline", "tier"]) {
  $(id).addEventListener("input", () => $(`${id}-wrong`).hidden || complain(id, ""));
}
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("stage").addEventListener(name, (event) => {
    event.preventDefault();
    $("stage").classList.toggle("over", over);
    if (name === "drop" && state.card && event.dataTransfer.files.length) {
      openPicture(event.dataTransfer.files);
    }
  });
}
watchPhase();
