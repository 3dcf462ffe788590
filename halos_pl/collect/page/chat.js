// The chat page. The server keeps the conversation; this script shows it, and never confirms what the server has not.
"use strict";

const KIND = document.body.dataset.kind;
const LETTERS = ["A", "B"];
const $ = (id) => document.getElementById(id);
const [turns, message, send, notice, scroller] = [$("turns"), $("message"), $("send"), $("notice"), document.scrollingElement];
let chat = null; // the conversation as the server last described it
let stream = null; // news about the answer that is being written
let busy = false; // a call is under way

const sentence = (text) => text && text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
const isOpen = (turn) => turn.status === "waiting" || turn.status === "writing";
const last = () => chat && chat.turns[chat.turns.length - 1];

function tell(text, isError = false) {
  notice.textContent = text;
  notice.classList.toggle("error", isError);
}

async function call(path, body) {
  const json = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : json);
  } catch {
    throw new Error("there is no connection to the server, so nothing was recorded; try again");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const error = new Error(answer.error || `the server failed with status ${response.status}`);
  error.status = response.status;
  throw error;
}

// Makes a call that changes the conversation, and shows the result. Returns whether it succeeded.
async function change(path, body) {
  if (busy) return false;
  busy = true;
  tell("");
  try {
    show(await call(path, body));
    return true;
  } catch (error) {
    tell(sentence(error.message), true);
    if (error.status === 404) forget();
    else if (chat && error.status === 409) show(await call(`chats/${chat.id}`).catch(() => chat));
    return false;
  } finally {
    busy = false;
    update();
  }
}

// Showing -----------------------------------------------------------------------------------------------

function show(state) {
  chat = state;
  sessionStorage.setItem("chat", chat.id);
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  const isNew = chat.turns.length > turns.children.length;
  $("count").textContent = chat.recorded;
  while (turns.children.length > chat.turns.length) turns.lastChild.remove();
  chat.turns.forEach(showTurn);
  turns.setAttribute("aria-busy", String(chat.turns.some(isOpen)));
  if (isNew || atEnd) scroller.scrollTop = scroller.scrollHeight;
  update();
  if (last() && isOpen(last())) listen();
}

function showTurn(turn, at) {
  if (!turns.children[at]) turns.append(newTurn(at));
  const element = turns.children[at];
  element.querySelector(".message .text").textContent = turn.message;
  element.querySelectorAll(".answer").forEach((each, i) => showAnswer(each, turn, i));
  const outcome = element.querySelector(".outcome");
  const [text, action] = outcomeOf(turn, at);
  outcome.classList.toggle("recorded", turn.value !== null);
  outcome.classList.toggle("failed", turn.status === "failed");
  setText(outcome.querySelector(".state"), text);
  const button = outcome.querySelector(".action");
  button.classList.toggle("vacant", !action);
  if (action) button.textContent = action.label;
  button.onclick = action && (() => change(`chats/${chat.id}/${at}/${action.path}`, action.body || {}));
  const aside = element.querySelector(".aside");
  aside.hidden = KIND === "thumbs" || turn.continued === null || turn.value === null || turn.continued === Number(turn.value);
  if (!aside.hidden) setText(aside, `The conversation continued with answer ${LETTERS[turn.continued]}.`);
}

function newTurn(at) {
  const element = $("turn").content.cloneNode(true).firstElementChild;
  element.setAttribute("aria-label", `Message ${at + 1}`);
  for (let i = 0; i < (KIND === "choices" ? 2 : 1); i++) {
    const answer = $("answer").content.cloneNode(true).firstElementChild;
    answer.querySelector("h2").textContent = KIND === "choices" ? `Answer ${LETTERS[i]}` : "Answer";
    answer.querySelectorAll(".verdict").forEach((button) => {
      if (KIND === "choices") button.textContent = `${LETTERS[i]} is better`;
      const value = KIND === "choices" ? i : button.dataset.value === "true";
      button.onclick = () => change(`chats/${chat.id}/${at}/verdict`, { value });
    });
    element.querySelector(".answers").append(answer);
  }
  return element;
}

function showAnswer(element, turn, i) {
  const answer = turn.answers[i];
  setText(element.querySelector(".text"), answer ? answer.text : "");
  element.querySelector(".cut").hidden = !answer || answer.finished;
  element.classList.toggle("chosen", KIND === "choices" && turn.value === i);
  element.querySelectorAll(".verdict").forEach((button) => {
    const value = KIND === "choices" ? i : button.dataset.value === "true";
    button.disabled = turn.status !== "done" || turn.same;
    button.setAttribute("aria-pressed", String(turn.value === value));
  });
}

// The line below the answers: what happened, and what can be done about it.
function outcomeOf(turn, at) {
  const isLast = at === chat.turns.length - 1;
  const again = { label: KIND === "choices" ? "New answers" : "New answer", path: "again" };
  const stop = { label: "Stop", path: "stop" };
  if (turn.status === "waiting")
    return [turn.ahead ? `Waiting: ${turn.ahead} before you.` : "Waiting for the model.", stop];
  if (turn.status === "writing") return ["The model is writing.", stop];
  const retry = isLast ? { label: "Try again", path: "again" } : null;
  if (turn.status === "failed") return [sentence(`no answer: ${turn.error}`), retry];
  if (turn.status === "stopped") return ["Stopped. The answer was dropped.", retry];
  if (turn.value !== null) {
    const time = new Date(turn.time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const what = KIND === "choices" ? `${LETTERS[turn.value]} is better` : turn.value ? "good" : "bad";
    return [`Recorded at ${time}: ${what}.`, { label: "Undo", path: "verdict", body: { value: null } }];
  }
  if (turn.same) return ["Both answers are the same, so there is nothing to choose.", isLast ? again : null];
  return ["Not judged.", isLast ? again : null];
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // unchanged text is not announced again
}

// Enables the composer if the conversation can continue.
function update() {
  const turn = last();
  const needsChoice = KIND === "choices" && turn && turn.status === "done" && turn.value === null && !turn.same;
  const answered = !turn || turn.status === "done";
  send.disabled = busy || !answered || needsChoice;
  if (!busy && !notice.classList.contains("error"))
    tell(needsChoice ? "Choose the better answer to continue." : answered ? "" : notice.textContent);
}

// Follows the answer that is being written. The browser reconnects by itself.
function listen() {
  if (stream) return;
  stream = new EventSource(`chats/${chat.id}/events`);
  stream.onmessage = (event) => {
    const [turn] = JSON.parse(event.data);
    if (notice.dataset.lost) tell((notice.dataset.lost = ""));
    if (turn) show({ ...chat, turns: [...chat.turns.slice(0, turn.number), turn] });
  };
  stream.addEventListener("end", async () => {
    hangUp();
    show(await call(`chats/${chat.id}`).catch(() => chat));
    if (last().status === "done" && !notice.textContent) tell("The answer is complete.");
  });
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) {
      hangUp();
      resume();
    } else {
      notice.dataset.lost = "yes";
      tell("The connection was lost; trying again …", true);
    }
  };
}

function hangUp() {
  if (stream) stream.close();
  stream = null;
}

// Conversations -----------------------------------------------------------------------------------------

function forget() {
  hangUp();
  chat = null;
  sessionStorage.removeItem("chat");
  turns.replaceChildren();
  update();
}

async function resume() {
  const id = sessionStorage.getItem("chat");
  if (!id) return;
  try {
    show(await call(`chats/${id}`));
  } catch (error) {
    if (error.status === 404) forget();
    tell(sentence(error.message), true);
  }
}

$("composer").onsubmit = async (event) => {
  event.preventDefault();
  const text = message.value;
  if (send.disabled || !text.trim()) return;
  if (!chat && !(await change("chats", {}))) return;
  if (await change(`chats/${chat.id}/messages`, { text })) {
    message.value = "";
    sessionStorage.removeItem("draft");
  }
};

message.oninput = () => sessionStorage.setItem("draft", message.value);
message.onkeydown = (event) => {
  const isTouch = matchMedia("(pointer: coarse)").matches; // there, Enter is the only way to a new line
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  $("composer").requestSubmit();
};

$("new").onclick = () => {
  if (last() && isOpen(last())) call(`chats/${chat.id}/${last().number}/stop`, {}).catch(() => {});
  forget();
  tell("");
  scroller.scrollTop = 0;
  message.focus();
};

message.value = sessionStorage.getItem("draft") || "";
update();
resume();
